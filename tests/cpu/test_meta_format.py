"""Meta's consolidated.NN.pth: any number of parts gives Hugging Face's tensors; nothing in a .pth is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama import Engine, EngineConfig, ModelConfig, SamplingParams
from llama.checkpoint import hf_shapes, load_parameters, open_checkpoint, read_config
from llama.errors import CheckpointError, EngineError, LoadError, TokenizerError
from llama.meta_format import read_pth, to_half_split, to_interleaved

MHA = ModelConfig(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=8, ffn_dim=176, vocab_size=96, max_seq_len=64, dtype="float32"
)
GQA = ModelConfig(
    dim=128, n_layers=2, n_heads=16, n_kv_heads=8, head_dim=8, ffn_dim=344, vocab_size=96, max_seq_len=64,
    dtype="float32",
)  # fmt: skip
CPU = torch.device("cpu")
# How long the fuzz runs: 1 is a few seconds; LLAMA_FUZZ=100 is the long form.
ROUNDS = int(os.environ.get("LLAMA_FUZZ", "1"))


def hf_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.dtype)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in hf_shapes(config).items()}


def meta_parts(tensors: dict[str, Tensor], config: ModelConfig, n: int) -> list[dict[str, Tensor]]:
    """What Meta's own programs would have saved, written down row by row and not through the loader's table."""

    def interleaved(w: Tensor) -> Tensor:
        rows = []
        for head in range(w.shape[0] // config.head_dim):
            for pair in range(config.head_dim // 2):
                first = head * config.head_dim + pair
                rows += [w[first], w[first + config.head_dim // 2]]
        return torch.stack(rows)

    def cut(w: Tensor, dim: int | None) -> list[Tensor]:
        return [w.clone() for _ in range(n)] if dim is None else [part.clone() for part in w.chunk(n, dim)]

    cuts: dict[str, list[Tensor]] = {
        "tok_embeddings.weight": cut(tensors["model.embed_tokens.weight"], 1),
        "norm.weight": cut(tensors["model.norm.weight"], None),
        "output.weight": cut(tensors["lm_head.weight"], 0),
    }
    for i in range(config.n_layers):
        a, m = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        cuts |= {
            f"layers.{i}.attention.wq.weight": cut(interleaved(tensors[f"{a}.q_proj.weight"]), 0),
            f"layers.{i}.attention.wk.weight": cut(interleaved(tensors[f"{a}.k_proj.weight"]), 0),
            f"layers.{i}.attention.wv.weight": cut(tensors[f"{a}.v_proj.weight"], 0),
            f"layers.{i}.attention.wo.weight": cut(tensors[f"{a}.o_proj.weight"], 1),
            f"layers.{i}.feed_forward.w1.weight": cut(tensors[f"{m}.gate_proj.weight"], 0),
            f"layers.{i}.feed_forward.w2.weight": cut(tensors[f"{m}.down_proj.weight"], 1),
            f"layers.{i}.feed_forward.w3.weight": cut(tensors[f"{m}.up_proj.weight"], 0),
            f"layers.{i}.attention_norm.weight": cut(tensors[f"model.layers.{i}.input_layernorm.weight"], None),
            f"layers.{i}.ffn_norm.weight": cut(tensors[f"model.layers.{i}.post_attention_layernorm.weight"], None),
        }
    return [{name: pieces[part] for name, pieces in cuts.items()} for part in range(n)]


def write_params(folder: Path, config: ModelConfig) -> None:
    params = {
        "dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads,
        "norm_eps": config.norm_eps, "vocab_size": config.vocab_size, "max_seq_len": config.max_seq_len,
        "multiple_of": 8,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))


def meta_folder(folder: Path, config: ModelConfig, n: int, tensors: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir()
    write_params(folder, config)
    for i, part in enumerate(meta_parts(tensors or hf_tensors(config), config, n)):
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    return folder


def load(folder: Path, config: ModelConfig | None = None) -> dict[str, Tensor]:
    config = config or read_config(folder)
    return load_parameters(folder, config, getattr(torch, config.dtype), CPU, progress=False)


def refused(folder: Path, match: str, kind: type[EngineError] = LoadError) -> EngineError:
    with pytest.raises(kind, match=match) as caught:
        load(folder)
    return caught.value


# --- what loads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [MHA, GQA], ids=["MHA", "GQA"])
@pytest.mark.parametrize("n", [1, 2, 8])
def test_meta_parts_load_as_hugging_face_loads(tmp_path: Path, config: ModelConfig, n: int, dtype: str) -> None:
    config = replace(config, dtype=dtype)
    tensors = hf_tensors(config)
    hf = tmp_path / "hf"
    hf.mkdir()
    save_file(tensors, hf / "model.safetensors")
    meta = meta_folder(tmp_path / "meta", config, n, tensors)
    assert read_config(meta) == config
    expected, found = load(hf, config), load(meta)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_both_orders_of_rows_turn_alike() -> None:
    """The rotary embedding of interleaved pairs (Meta's complex numbers) and of half-split ones give equal scores."""
    head_dim, dim, position = 8, 24, 5
    wq, wk, x, y = (torch.randn(size, dtype=torch.float64) for size in ((head_dim, dim), (head_dim, dim), dim, dim))
    angles = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def complex_turned(rows: Tensor, at: int) -> Tensor:
        pairs = torch.view_as_complex(rows.view(-1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), at * angles)).flatten()

    def half_turned(rows: Tensor, at: int) -> Tensor:
        a, b = rows.chunk(2)
        return torch.cat(
            [a * (at * angles).cos() - b * (at * angles).sin(), b * (at * angles).cos() + a * (at * angles).sin()]
        )

    meta = complex_turned(wq @ x, position) @ complex_turned(wk @ y, 2)
    ours = half_turned(to_half_split(wq, head_dim) @ x, position) @ half_turned(to_half_split(wk, head_dim) @ y, 2)
    torch.testing.assert_close(ours, meta)


def test_the_two_orders_are_inverse() -> None:
    rows = torch.randn(48, 5)
    assert torch.equal(to_interleaved(to_half_split(rows, 12), 12), rows)
    assert not torch.equal(to_half_split(rows, 12), rows)


def test_what_meta_files_may_carry_besides(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "meta", MHA, 1)
    path = folder / "consolidated.00.pth"
    torch.save(OrderedDict(torch.load(path, weights_only=True) | {"rope.freqs": torch.ones(4)}), path)
    assert load(folder).keys() == load(meta_folder(tmp_path / "plain", MHA, 1)).keys()


def test_views_of_one_storage_are_read(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32)
    torch.save({"a": whole[:8].view(2, 4), "b": whole[8:]}, tmp_path / "x.pth")
    for name, region in read_pth(tmp_path / "x.pth").items():
        out = torch.empty(region.shape)
        region.read_rows(0, out)
        assert torch.equal(out.flatten(), whole[:8] if name == "a" else whole[8:])


def test_the_engine_loads_a_meta_folder(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    """With its tokenizer in the folder above, as Meta's downloads have it; with the answers of Hugging Face's form."""
    config = replace(GQA, vocab_size=400)
    tensors = hf_tensors(config)
    folder = meta_folder(tmp_path / "7b", config, 2, tensors)
    shutil.copy(tiny_tokenizer_file, tmp_path / "tokenizer.model")
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=3, prompt_logprobs=3)
    with Engine(folder, EngineConfig(dtype="float32"), progress=False) as engine:
        assert engine.tokenizer is not None
        found = engine.generate(["Once upon a time"], params)
    hf = tmp_path / "hf"
    hf.mkdir()
    save_file(tensors, hf / "model.safetensors")
    write_params(hf, config)
    with Engine(hf, EngineConfig(dtype="float32"), progress=False) as engine:
        assert engine.generate([found[0].prompt_ids], params)[0].prompt_logprobs == found[0].prompt_logprobs


# --- parts at fault ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_half_a_download_of_parts(tmp_path: Path, kept: int) -> None:
    folder = meta_folder(tmp_path / "meta", GQA, 8)
    for i in range(kept, 8):
        (folder / f"consolidated.{i:02}.pth").unlink()
    refused(folder, rf"has {kept} of 8 parts; download the others, up to consolidated\.07\.pth")


def test_a_gap_in_the_parts(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "meta", GQA, 8)
    (folder / "consolidated.03.pth").unlink()
    refused(folder, r"consolidated\.03\.pth: is missing, but later parts are there")


@pytest.mark.parametrize("keep", [0, 3, 100, -1000, -1])
def test_half_a_part(tmp_path: Path, keep: int) -> None:
    folder = meta_folder(tmp_path / "meta", MHA, 2)
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:keep])
    error = refused(folder, "half a download")
    assert isinstance(error, LoadError) and error.path == path


def test_parts_of_two_checkpoints(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "meta", MHA, 2)
    other = meta_folder(tmp_path / "other", MHA, 2, hf_tensors(MHA, seed=1))
    shutil.copy(other / "consolidated.01.pth", folder)
    error = refused(folder, "differs between consolidated.00.pth and consolidated.01.pth", CheckpointError)
    assert "are all parts of one checkpoint?" in str(error)
    wider = meta_folder(tmp_path / "wider", GQA, 2)
    shutil.copy(wider / "consolidated.01.pth", folder)
    refused(folder, "which do not fit together; are all parts of one checkpoint", CheckpointError)


def test_a_part_that_lacks_a_tensor_and_one_that_has_more(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "meta", MHA, 2)
    for i in range(2):
        path = folder / f"consolidated.{i:02}.pth"
        part = torch.load(path, weights_only=True)
        if i:
            del part["layers.0.attention.wq.weight"]
        torch.save(part | {"adapter.weight": torch.ones(2)}, path)
    error = refused(folder, "problem", CheckpointError)
    assert isinstance(error, CheckpointError)
    assert error.problems == [
        "layers.0.attention.wq.weight: missing in consolidated.01.pth; are all parts of one checkpoint?",
        "adapter.weight: unknown tensor in consolidated.00.pth",
        "model.layers.0.self_attn.q_proj.weight: missing",
    ]


def test_a_wrong_dtype_and_a_number_that_is_none(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "meta", MHA, 1)
    path = folder / "consolidated.00.pth"
    part = torch.load(path, weights_only=True)
    torch.save(part | {"norm.weight": part["norm.weight"].double()}, path)
    refused(folder, r"model\.norm\.weight: dtype F64 in consolidated\.00\.pth, must be F32", CheckpointError)
    part["layers.1.feed_forward.w2.weight"][5, 7] = torch.nan
    torch.save(part, path)
    refused(folder, r"layers\.1\.mlp\.down_proj\.weight: holds numbers that are not finite", CheckpointError)


def test_a_file_cut_while_it_is_read(tmp_path: Path) -> None:
    """No map is held: the end of the file is an error, not a signal."""
    folder = meta_folder(tmp_path / "meta", MHA, 1)
    config = read_config(folder)
    checkpoint = open_checkpoint(folder, config)
    os.truncate(folder / "consolidated.00.pth", 5000)
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(LoadError, match="cut short"):
        checkpoint.tensors[name].read(0, torch.empty(hf_shapes(config)[name]))


def test_a_lora_adapter_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoadError, match="is a LoRA adapter, not a model; merge it into its base model"):
        Engine(tmp_path)


# --- hostile files ----------------------------------------------------------------------------------------------


class Runs:
    """Unpickled, it makes a file; that file must never appear."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def zip_of(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", b"\0" * 64)
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", b"3\n")


def tensor_pickle(storage: str, numel: int, size: bytes, stride: bytes, function: str = "_rebuild_tensor_v2") -> bytes:
    """The pickle of {"norm.weight": a tensor} with the sizes given as opcodes."""
    return (
        b"\x80\x02}X\x0b\x00\x00\x00norm.weightctorch._utils\n" + function.encode() + b"\n((X\x07\x00\x00\x00storage"
        b"ctorch\n" + storage.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ" + numel.to_bytes(4, "little")
        + b"tQK\x00" + size + stride + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def test_the_handmade_pickle_is_a_good_one(tmp_path: Path) -> None:
    zip_of(tmp_path / "x.pth", tensor_pickle("FloatStorage", 16, b"K\x10\x85", b"K\x01\x85"))
    assert read_pth(tmp_path / "x.pth")["norm.weight"].shape == (16,)


def hostile(kind: str, path: Path, canary: Path) -> None:
    """Write a .pth that would do harm if it were opened carelessly."""
    good = {"norm.weight": torch.ones(16)}
    match kind:
        case "reduce":
            torch.save(good | {"x": Runs(canary)}, path)
        case "reduce, protocol 4":
            torch.save(good | {"x": Runs(canary)}, path, pickle_protocol=4)
        case "bare pickle":
            path.write_bytes(pickle.dumps(Runs(canary)))
        case "old format":
            torch.save(good | {"x": Runs(canary)}, path, _use_new_zipfile_serialization=False)
        case "old format, harmless":
            torch.save(good, path, _use_new_zipfile_serialization=False)
        case "tar":
            with tarfile.open(path, "w") as archive:
                data = pickle.dumps(Runs(canary))
                info = tarfile.TarInfo("pickle")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        case "zip in zip":
            inner = path.with_name("inner")
            torch.save(good | {"x": Runs(canary)}, inner)
            zip_of(path, inner.read_bytes())
        case "two pickles":
            zip_of(path, pickle.dumps({}, 2), **{"sub/data.pkl": pickle.dumps(Runs(canary))})
        case "same name twice":
            with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
                for data in (pickle.dumps({}, 2), pickle.dumps(Runs(canary))):
                    archive.writestr("archive/data.pkl", data)
        case "compressed bomb":
            zip_of(path, b"\x80\x02" + b"0" * (64 << 20), zipfile.ZIP_DEFLATED)
        case "big pickle":
            zip_of(path, b"\x80\x02" + b"N0" * (4 << 20) + b"N.")
        case "eval":
            zip_of(path, b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x001+11\x85R.")
        case "bytearray bomb":
            zip_of(path, b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x40\x85R.")
        case "module of ours":
            zip_of(path, b"\x80\x02cllama.engine\nEngine\nX\x04\x00\x00\x00demo\x85R.")
        case "INST":
            zip_of(path, b"(S'x'\nios\nsystem\n.")
        case "deep":
            zip_of(path, b"\x80\x02" + b"(" * 500_000 + b"t" * 500_000 + b".")
        case "shape past its storage":
            zip_of(path, tensor_pickle("FloatStorage", 16, b"J\x00\x00\x00\x40\x85", b"K\x01\x85"))
        case "one number many times":
            zip_of(path, tensor_pickle("FloatStorage", 16, b"J\x00\x00\x00\x40\x85", b"K\x00\x85"))
        case "storage past the file":
            zip_of(path, tensor_pickle("FloatStorage", 2**31 - 1, b"K\x10\x85", b"K\x01\x85"))
        case "negative sizes":
            zip_of(path, tensor_pickle("FloatStorage", 16, b"J\xff\xff\xff\xff\x85", b"K\x01\x85"))
        case "empty dictionary":
            torch.save({}, path)
        case "a list":
            torch.save([torch.ones(2)], path)
        case "an object":
            torch.save(torch.nn.Linear(2, 2), path)
        case "number as name":
            torch.save({1: torch.ones(2)}, path)
        case "sparse":
            torch.save({"norm.weight": torch.eye(16).to_sparse()}, path)
        case "quantized":
            torch.save({"norm.weight": torch.zeros(0)}, path)
        case "transposed":
            torch.save({"norm.weight": torch.ones(4, 3).t()}, path)
        case "script":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/code/__torch__.py", "import os")
                archive.writestr("archive/constants.pkl", b"\x80\x02).")
        case _:
            raise AssertionError(kind)


HOSTILE = [
    "reduce", "reduce, protocol 4", "bare pickle", "old format", "old format, harmless", "tar", "zip in zip",
    "two pickles", "same name twice", "compressed bomb", "big pickle", "eval", "bytearray bomb", "module of ours",
    "INST", "deep", "shape past its storage", "one number many times", "storage past the file", "negative sizes",
    "empty dictionary", "a list", "an object", "number as name", "sparse", "quantized", "transposed", "script",
]  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pth_runs_nothing(tmp_path: Path, kind: str) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    write_params(folder, MHA)
    path = folder / "consolidated.00.pth"
    hostile(kind, path, canary)
    with pytest.raises(LoadError) as caught:
        Engine(folder)
    # One is a tensor of 16 numbers all the same, so that only the other tensors are missed.
    assert caught.value.path == (folder if kind == "storage past the file" else path)
    assert not canary.exists()


def test_the_old_formats_are_refused_with_a_hint(tmp_path: Path) -> None:
    for kind in ("old format, harmless", "tar"):
        hostile(kind, tmp_path / "x.pth", tmp_path / "canary")
        with pytest.raises(LoadError, match=r"old format.*use safetensors"):
            read_pth(tmp_path / "x.pth")


def test_a_suspicious_name_is_named(tmp_path: Path) -> None:
    hostile("reduce", tmp_path / "x.pth", tmp_path / "canary")
    with pytest.raises(LoadError, match=r"its pickle names (posix|os|nt)\.mkdir, which no weights need; do not trust"):
        read_pth(tmp_path / "x.pth")


def test_torch_opens_one_kind_of_file_in_one_place() -> None:
    """The only torch.load has both locks, written out."""
    root = Path(__file__).parents[2]
    calls = []
    for floor in ("kernels", "llama", "api", "scripts"):
        for path in (root / floor).rglob("*.py"):
            calls += [line.strip() for line in path.read_text().splitlines() if "torch.load(" in line]
    assert len(calls) == 1
    assert "weights_only=True" in calls[0] and "mmap=True" in calls[0]


# --- mutations --------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random, first: int, end: int) -> bytes:
    """data with a few bytes between first and end changed, put in, taken out, or the rest cut off."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at = rng.randrange(first, max(first + 1, min(end, len(made))))
        match rng.randrange(6):
            case 0 | 1:
                made[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                made[at : at + 1] = bytes([made[at] ^ 1 << rng.randrange(8)]) if at < len(made) else b""
            case 3:
                del made[at : at + rng.randrange(1, 9)]
            case 4:
                made[at:at] = rng.choice(
                    (b"0", b"9" * 20, b"[", b"{", b'"', b"\xff", b"-1", b"1e400", b"null", b"\\u0000")
                )
            case 5 if rng.random() < 0.1:
                del made[at:]
    return bytes(made)


def survives(act: Callable[[], object]) -> bool:
    """True if it went well; False after a typed error. Any other exception is a failure."""
    try:
        act()
    except EngineError:
        return False
    return True


def test_mutated_pth_files_give_typed_errors(tmp_path: Path) -> None:
    rng = random.Random(5)
    path = tmp_path / "x.pth"
    torch.save({f"layers.{i}.attention_norm.weight": torch.ones(8) for i in range(4)}, path)
    data = path.read_bytes()
    central = data.index(b"PK\x01\x02")
    good = 0
    for _ in range(400 * ROUNDS):
        # The header of the first entry and its pickle, or the zip's directory at the end.
        first, end = rng.choice(((0, 1200), (central, len(data))))
        path.write_bytes(mutated(data, rng, first, end))
        good += survives(lambda: read_pth(path))
    assert good < 400 * ROUNDS


def test_a_broken_tokenizer_is_seen_before_the_weights(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    folder = meta_folder(tmp_path / "7b", MHA, 1)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_file.read_bytes()[:100])
    with pytest.raises(TokenizerError):
        Engine(folder)
