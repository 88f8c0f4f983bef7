"""llama.cpp as a side of a comparison, through llama-cpp-python's low-level calls, with the weights of a folder.

It reads GGUF only, so the weights are written as GGUF first, with q and k rows in the order of its rotary embedding.
Sequences are decoded together, one `llama_decode` a step. Only the last token of a sequence gets logits, and the best
token is picked from them in place.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.sides import Side
from llama.checkpoint import read_config, shard_files
from llama.config import ModelConfig
from llama.meta_format import to_interleaved
from llama_slots.extras import pip_command
from llama_slots.weights.gguf_file import gguf_table

try:
    import gguf
    import llama_cpp
except ImportError:
    gguf = llama_cpp = None  # type: ignore[assignment]


class Running(NamedTuple):
    """A sequence of `LlamaCpp.batch`: what it computes next, from which position on; how many tokens it still makes."""

    position: int
    tokens: list[int]
    left: int


class LlamaCpp:
    """n_seqs: how many sequences at most decode together. context: tokens of one of them.

    cache: "split", a part for each sequence, or "unified". With parts llama.cpp computes together only sequences that
    are neighbours and have equally many tokens; with one cache everything, but attention sees all sequences' keys.
    """

    def __init__(self, config: ModelConfig, model: Any, cache: str, threads: int, n_seqs: int, context: int) -> None:
        self.name, self.config = f"llama.cpp {cache}", config
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = n_seqs * context, n_seqs, max(2048, n_seqs)
        params.n_threads = params.n_threads_batch = threads
        params.no_perf, params.kv_unified = True, cache == "unified"
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._n_batch = params.n_batch
        self._batch = llama_cpp.llama_batch_init(self._n_batch, 0, 1)

    def prefill(self, prompt: list[int]) -> float:
        self._forget()
        start = time.perf_counter()
        self._run([(0, 0, prompt)])
        return len(prompt) / (time.perf_counter() - start)

    def decode(self, prompt: list[int], n: int) -> float:
        self._forget()
        (token,) = self._run([(0, 0, prompt)])
        start = time.perf_counter()
        for at in range(len(prompt), len(prompt) + n - 1):
            (token,) = self._run([(0, at, [token])])
        return (n - 1) / (time.perf_counter() - start)

    def batch(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> float:
        """A sequence that has its tokens makes room for the next prompt, which is computed beside the others' tokens.
        At most n_seqs at once."""
        self._forget()
        waiting, live = list(zip(prompts, lengths, strict=True))[::-1], dict[int, Running]()
        start = time.perf_counter()
        while waiting or live:
            for seq in range(at_once):
                if seq not in live and waiting:
                    live[seq] = Running(0, *waiting.pop())
            parts = sorted(live.items())  # in any other order a split cache takes them apart
            picked = self._run([(seq, running.position, running.tokens) for seq, running in parts])
            for (seq, running), token in zip(parts, picked, strict=True):
                if running.left > 1:
                    live[seq] = Running(running.position + len(running.tokens), [token], running.left - 1)
                else:
                    del live[seq]
                    self._forget(seq)
        return sum(lengths) / (time.perf_counter() - start)

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        self._forget()
        tokens = self._run([(0, 0, prompt)])
        while len(tokens) < n:
            tokens += self._run([(0, len(prompt) + len(tokens) - 1, tokens[-1:])])
        return tokens

    def _forget(self, seq: int = -1) -> None:
        """A sequence, or -1 for all."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), seq, -1, -1)

    def _run(self, parts: list[tuple[int, int, list[int]]]) -> list[int]:
        """Compute (sequence, first position, tokens); the best next token of each. Raises ValueError for too many."""
        batch, row, wanted = self._batch, 0, []
        if (n_tokens := sum(len(tokens) for _, _, tokens in parts)) > self._n_batch:
            raise ValueError(f"llama.cpp: {n_tokens} tokens in one call, {self._n_batch} at most")
        for seq, first, tokens in parts:
            for i, token in enumerate(tokens):
                batch.token[row], batch.pos[row] = token, first + i
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, seq
                batch.logits[row] = i + 1 == len(tokens)
                row += 1
            wanted.append(row - 1)
        batch.n_tokens = row
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode answered {code}")
        shape = (self.config.vocab_size,)
        rows = (llama_cpp.llama_get_logits_ith(self._context, i) for i in wanted)
        return [int(np.ctypeslib.as_array(logits, shape).argmax()) for logits in rows]


if llama_cpp is not None:
    _SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


def llama_cpp_missing() -> str | None:
    """Why llama.cpp cannot be a side, or None."""
    return None if llama_cpp is not None else f"llama-cpp-python and gguf are not installed: {pip_command('bench')}"


def llama_cpp_facts() -> dict[str, str] | None:
    """What its figures depend on besides the machine: its version, and the instructions it was built for."""
    if llama_cpp is None:
        return None
    return {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode().strip()}


def llama_cpp_sides(folder: Path, dtype: str, scratch: Path, threads: int, n_seqs: int, context: int) -> list[Side]:
    """A side for each form of the cache, sharing the weights. Call it in a process of its own: llama.cpp's memory is
    freed when that process ends."""
    file = scratch / f"weights-{dtype}.gguf"
    if not file.exists():
        write_gguf(folder, file, dtype)
    llama_cpp.llama_log_set(_SILENT, None)
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    caches = ("split", "unified") if n_seqs > 1 else ("split",)
    return [LlamaCpp(read_config(folder), model, cache, threads, n_seqs, context) for cache in caches]


def write_gguf(folder: Path, file: Path, dtype: str) -> None:
    """The folder's weights in GGUF, matrices in dtype, norms in fp32. The vocabulary is made up: only ids are used."""
    config = read_config(folder)
    out = gguf.GGUFWriter(file, "llama")
    out.add_context_length(config.max_seq_len)
    out.add_embedding_length(config.dim)
    out.add_block_count(config.n_layers)
    out.add_feed_forward_length(config.ffn_dim)
    out.add_head_count(config.n_heads)
    out.add_head_count_kv(config.n_kv_heads)
    out.add_layer_norm_rms_eps(config.norm_eps)
    out.add_rope_freq_base(config.rope_theta)
    out.add_rope_dimension_count(config.head_dim)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("llama")
    out.add_token_list([b"<unk>", b"<s>", b"</s>"] + [f"<{i}>".encode() for i in range(3, config.vocab_size)])
    out.add_token_scores([0.0] * config.vocab_size)
    out.add_token_types([2, 3, 3] + [1] * (config.vocab_size - 3))  # unknown, control, normal
    table = gguf_table(config)
    for shard in shard_files(folder):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if name in table:
                    tensor = tensors.get_tensor(name)
                    if name.endswith(("q_proj.weight", "k_proj.weight")):
                        tensor = to_interleaved(tensor, config.head_dim)
                    _add(out, table[name], tensor, dtype)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _add(out: Any, name: str, tensor: Tensor, dtype: str) -> None:
    if tensor.dim() == 1 or dtype == "float32":
        out.add_tensor(name, tensor.float().numpy())
    elif dtype == "float16":
        out.add_tensor(name, tensor.half().numpy())
    else:
        raw = tensor.bfloat16().view(torch.uint8).numpy()
        out.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
