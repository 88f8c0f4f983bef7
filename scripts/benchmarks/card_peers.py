"""Peers that run on a card only: gpt-fast from a checkout, and vLLM where it is installed.

Written against gpt-fast at 6ecad9b and the documentation of vLLM's LLM class, without a card at hand. If either has
changed, the comparison ends with its error and without a figure.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Peer
from benchmarks.remote import RemoteSides
from benchmarks.sides import Side
from llama.checkpoint import read_config
from llama.meta_format import read_pth
from llama_slots.weights.source import META, open_source
from llama_slots.weights.write import write_checkpoint

NEEDED = ("generate.py", "model.py", "tokenizer.py")
VLLM_SPARE = 6 << 30  # bytes of a card, for its activations and graphs


@dataclass(frozen=True)
class CardPeers:
    """The peers that the command line names. gpt_fast: a checkout of it."""

    gpt_fast: Path | None
    vllm: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> CardPeers:
        return cls(args.gpt_fast, args.vllm)


def add_card_peer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpt-fast", type=Path, metavar="DIR", help="a checkout of gpt-fast to measure beside: decode, on a card"
    )
    parser.add_argument("--vllm", action="store_true", help="measure vLLM beside, on a card where it is installed")


def asked_for(named: CardPeers, device: str, folder: Path, scratch: Path) -> list[Peer]:
    peers = []
    if named.gpt_fast is not None:
        peers.append(gpt_fast_peer(named.gpt_fast, device, folder, scratch))
    if named.vllm:
        peers.append(vllm_peer(device, folder))
    return peers


# --- gpt-fast ----------------------------------------------------------------------------------------------------


def gpt_fast_missing(checkout: Path, device: str) -> str | None:
    """Why gpt-fast cannot be a side, or None."""
    if missing := [name for name in NEEDED if not (checkout / name).is_file()]:
        return f"the folder given is no checkout of it: there is no {missing[0]}"
    return _no_card(device)


def gpt_fast_peer(checkout: Path, device: str, folder: Path, scratch: Path) -> Peer:
    def start(dtype: str, n_seqs: int, context: int) -> RemoteSides:
        return RemoteSides(gpt_fast_sides, checkout.resolve(), folder, scratch, dtype, device, context)

    return Peer("gpt-fast", gpt_fast_missing(checkout, device), start, only=["decode"])


def gpt_fast_sides(checkout: Path, folder: Path, scratch: Path, dtype: str, device: str, context: int) -> list[Side]:
    """To be made in a process of its own: its modules have names such as `model`."""
    return [GptFast(checkout, folder, scratch, dtype, device, context)]


def gpt_fast_weights(folder: Path, scratch: Path, dtype: str) -> Path:
    """The folder's weights under the names that gpt-fast reads, which are Meta's, in one file."""
    target = scratch / f"gpt-fast-{dtype}"
    if not target.exists():
        write_checkpoint(open_source(str(folder)), target, META, dtype, 1, False, False)
    return target / "consolidated.00.pth"


def tensors_of(path: Path, dtype: str) -> dict[str, torch.Tensor]:
    """Every tensor of a .pth whose tensors are all of that dtype."""
    regions = read_pth(path)
    tensors = {name: torch.empty(region.shape, dtype=getattr(torch, dtype)) for name, region in regions.items()}
    for name, region in regions.items():
        region.read_rows(0, tensors[name])
    return tensors


class GptFast:
    """Its own `generate`, its decode step compiled as its command line does with --compile."""

    name = "gpt-fast"

    def __init__(self, checkout: Path, folder: Path, scratch: Path, dtype: str, device: str, context: int) -> None:
        sys.path.insert(0, str(checkout))
        self._theirs: dict[str, Any] = vars(importlib.import_module("generate"))
        model: Any = importlib.import_module("model")
        config = read_config(folder)
        args = model.ModelArgs(
            block_size=config.max_seq_len,
            vocab_size=config.vocab_size,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_local_heads=config.n_kv_heads,
            dim=config.dim,
            intermediate_size=config.ffn_dim,
            rope_base=config.rope_theta,
            norm_eps=config.norm_eps,
        )
        with torch.device("meta"):
            self._model = model.Transformer(args)
        weights = tensors_of(gpt_fast_weights(folder, scratch, dtype), dtype)
        self._model.load_state_dict(weights, assign=True)
        self._model = self._model.to(device=device, dtype=getattr(torch, dtype)).eval()
        self._device = device
        with torch.device(device):
            self._model.setup_caches(max_batch_size=1, max_seq_length=context)  # one size, so that it compiles once
        one_step = self._theirs["decode_one_token"]
        self._theirs["decode_one_token"] = torch.compile(one_step, mode="reduce-overhead", fullgraph=True)

    def decode(self, prompt: list[int], n: int) -> float:
        """Timed from the second new token on, the first that its callback hears of. Raises ValueError for n < 3."""
        if n < 3:
            raise ValueError(f"gpt-fast: the rate of {n} tokens cannot be timed")
        began: list[float] = []

        def token_made(_: object) -> None:
            if not began:
                torch.cuda.synchronize()
                began.append(time.perf_counter())

        self._generate(prompt, n, token_made)
        torch.cuda.synchronize()
        return (n - 2) / (time.perf_counter() - began[0])

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        return self._generate(prompt, n, lambda _: None)[len(prompt) :]

    def prefill(self, prompt: list[int]) -> float:
        raise NotImplementedError("gpt-fast is measured in decode only")

    def batch(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> float:
        raise NotImplementedError("gpt-fast is measured in decode only")

    def _generate(self, prompt: list[int], n: int, callback: Any) -> list[int]:
        ids = torch.tensor(prompt, dtype=torch.int64, device=self._device)
        options = {"interactive": False, "draft_model": None, "temperature": 1.0, "top_k": 1}
        rows, _ = self._theirs["generate"](self._model, ids, n, 1, callback=callback, **options)
        return rows[0].tolist()


# --- vLLM --------------------------------------------------------------------------------------------------------


def vllm_missing(device: str) -> str | None:
    """Why vLLM cannot be a side, or None."""
    return "is not installed" if find_spec("vllm") is None else _no_card(device)


def vllm_peer(device: str, folder: Path) -> Peer:
    def start(dtype: str, n_seqs: int, context: int) -> RemoteSides:
        return RemoteSides(vllm_sides, folder, dtype, n_seqs, context)

    subjects = ["decode", "batch8", "batch32", "prefill", "mixed32"]  # made for 32 in flight, it cannot be held to 8
    return Peer("vllm", vllm_missing(device), start, only=subjects)


def vllm_sides(folder: Path, dtype: str, n_seqs: int, context: int) -> list[Side]:
    return [Vllm(folder, dtype, n_seqs, context)]


class Vllm:
    """Its offline engine, in this process, with no more of the card than it needs for so many sequences."""

    name = "vllm"

    def __init__(self, folder: Path, dtype: str, n_seqs: int, context: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process may have no children
        self._vllm: Any = importlib.import_module("vllm")
        config, size = read_config(folder), getattr(torch, dtype).itemsize
        cache = 4 * config.n_layers * config.kv_dim * size * n_seqs * context  # twice what they can use
        needed = config.n_params * size + cache + VLLM_SPARE
        self._engine = self._vllm.LLM(
            model=str(folder),
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=context,
            max_num_seqs=n_seqs,
            enable_prefix_caching=False,
            gpu_memory_utilization=needed / torch.cuda.mem_get_info()[1],
        )

    def prefill(self, prompt: list[int]) -> float:
        return len(prompt) / self._run([prompt], [1])[1]

    def decode(self, prompt: list[int], n: int) -> float:
        """The first token's time is measured apart and taken off: vLLM's offline calls return whole answers."""
        return (n - 1) / (self._run([prompt], [n])[1] - self._run([prompt], [1])[1])

    def batch(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> float:
        return sum(lengths) / self._run(prompts, lengths)[1]

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        return self._run([prompt], [n])[0][0]

    def _run(self, prompts: list[list[int]], lengths: list[int]) -> tuple[list[list[int]], float]:
        """New tokens of each, and the seconds for all."""
        params = [
            self._vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for n in lengths
        ]
        start = time.perf_counter()
        results = self._engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = [list(result.outputs[0].token_ids) for result in results]
        assert [len(ids) for ids in tokens] == lengths
        return tokens, seconds


def _no_card(device: str) -> str | None:
    if not device.startswith("cuda"):
        return "is measured on CUDA only"
    return None if torch.cuda.is_available() else "needs a CUDA device, and there is none"
