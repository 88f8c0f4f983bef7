"""`system_fingerprint`: a name for everything that decides which tokens a request gets, but the request itself.

It covers weights, configuration, tokenizer, dtype, device, this project's sources and tile tables, and the versions of
the libraries that compute. Equal fingerprint, request and seed: equal tokens. "fpx_" promises nothing, since bits may
depend on what else is running (`batch_invariant=False`).
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import llama

# Files up to this size are hashed whole; of larger ones a window of WINDOW bytes in every STRIDE.
WHOLE = 1 << 30
STRIDE = 64 << 20
WINDOW = 64 << 10


def fingerprint(model_dir: Path, engine: llama.Engine) -> str:
    """fp_ (or fpx_) and 16 hex digits for an engine that serves the checkpoint in model_dir."""
    digest = hashlib.sha256(_code())
    for path in sorted(p for p in model_dir.iterdir() if p.suffix in (".safetensors", ".pth", ".json", ".model")):
        digest.update(path.name.encode())
        _add_file(digest, path)
    for part in (engine.setup.dtype, engine.setup.device, engine.max_seq_len, engine.model_config):
        digest.update(f"{part};".encode())
    return f"{'fp' if engine.setup.batch_invariant else 'fpx'}_{digest.hexdigest()[:16]}"


@cache
def _code() -> bytes:
    """A digest of our sources below this floor, and of the versions of what they stand on."""
    digest = hashlib.sha256()
    root = Path(str(llama.__file__)).parents[1]
    for package in ("kernels", "llama"):
        for path in sorted(path for path in (root / package).rglob("*") if path.suffix in (".py", ".json")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    for name in ("torch", "triton", "sentencepiece"):
        try:
            digest.update(f"{name}={version(name)};".encode())
        except PackageNotFoundError:
            digest.update(f"{name}=none;".encode())
    return digest.digest()


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{size};".encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            while data := file.read(STRIDE):
                digest.update(data)
            return
        for start in (*range(0, size, STRIDE), size - WINDOW):
            file.seek(start)
            digest.update(file.read(WINDOW))
