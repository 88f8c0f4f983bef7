"""Whether a checkpoint is whole: its headers, every number, Meta's checksums, its tokenizer, and one token from it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from llama.checkpoint import bytes_bar
from llama.config import EngineConfig, ModelConfig
from llama.engine import Engine
from llama.errors import ConfigError, EngineError
from llama.request import SamplingParams
from llama.tensor_file import CHUNK, FLOATS, chunks, is_finite
from llama.tokenizer import Tokenizer
from llama_slots.weights.source import META, Source

# (True: good, False: a fault, None: not checked; what there is to say)
Finding = tuple[bool | None, str]


def checks(source: Source, forward: bool, progress: bool) -> dict[str, Finding]:
    """The finding of each check, by name. A check does not run where an earlier fault leaves it nothing to check."""
    findings: dict[str, Finding] = {"coverage": _coverage(source)}
    if source.kind == META and (source.path / "checklist.chk").is_file():
        findings["checklist"] = _checklist(source.path)
    findings["numbers"] = _numbers(source, progress)
    findings["tokenizer"] = _tokenizer(source)
    if not forward:
        findings["forward"] = (None, "not asked for")
    elif any(passed is False for passed, _ in findings.values()):
        findings["forward"] = (None, "not run, because of the faults above")
    else:
        findings["forward"] = _forward(source.path, source.config, progress)
    return findings


def _coverage(source: Source) -> Finding:
    if source.problems:
        more = f" and {len(source.problems) - 5} more" if len(source.problems) > 5 else ""
        return False, "; ".join(source.problems[:5]) + more
    return True, f"{len(source.tensors)} tensors, each once, all of the shape that the configuration asks for"


def _checklist(folder: Path) -> Finding:
    """Meta's MD5 sums of its files."""
    wrong = []
    for line in (folder / "checklist.chk").read_text().splitlines():
        wanted, _, name = line.partition(" ")
        path = folder / Path(name.strip()).name
        if not path.is_file():
            wrong.append(f"{path.name} is missing")
            continue
        digest = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
        if digest.hexdigest() != wanted:
            wrong.append(f"{path.name} differs")
    return not wrong, "; ".join(wrong) + "; download these again" if wrong else "every file has the sum it should have"


def _numbers(source: Source, progress: bool) -> Finding:
    """Read every number; none may be infinite or NaN."""
    bad = []
    with bytes_bar(source.nbytes, source.path.name, progress) as bar:
        for name, tensor in source.tensors.items():
            if tensor.dtype not in FLOATS or not tensor.nbytes:
                continue
            finite = True
            for first, n in chunks(tensor):
                rows = torch.empty((n, *tensor.shape[1:]), dtype=FLOATS[tensor.dtype])
                tensor.read(first, rows)
                finite &= is_finite(rows)
                bar.update(rows.nbytes)
            if not finite:
                bad.append(name)
    if bad:
        return False, f"infinite or NaN in {', '.join(bad[:5])}{' and more' if len(bad) > 5 else ''}"
    return True, f"{source.nbytes / 1e9:.3f} GB read, all finite"


def _tokenizer(source: Source) -> Finding:
    if source.kind == "GGUF":
        return None, "made when it is converted"
    path = source.path / "tokenizer.model"
    if "tokenizer.model" not in source.companions:
        return None, "there is no tokenizer.model; the engine will take token ids only"
    try:
        tokenizer = Tokenizer(path if path.is_file() else source.path.absolute().parent / "tokenizer.model")
    except EngineError as error:
        return False, str(error)
    if tokenizer.vocab_size != source.config.vocab_size:
        return False, f"has {tokenizer.vocab_size} pieces, the model's vocabulary {source.config.vocab_size}"
    return True, f"{tokenizer.vocab_size} pieces, as many as the model has"


def _forward(folder: Path, config: ModelConfig, progress: bool) -> Finding:
    """Load the model and ask for one token."""
    options = EngineConfig(slots=1, max_seq_len=min(64, config.max_seq_len), max_batch_tokens=64, cuda_graphs=False)
    try:
        with Engine(folder, options, progress=progress) as engine:
            params = SamplingParams(max_tokens=1, temperature=0, logprobs=1, ignore_eos=True)
            token = engine.generate([[config.bos_id]], params)[0].token_ids[0]
            setup = engine.setup
            return True, f"one token ({token}) on {setup.device} in {str(setup.dtype).removeprefix('torch.')}"
    except ConfigError as error:
        return None, f"not run here: {error}"
    except EngineError as error:
        return False, str(error)
