"""`Setup`: what is decided about an engine before the first byte is allocated, and the runner built from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import kernels
from llama.cache import KVCache, MemoryPlan, plan_memory
from llama.checkpoint import load_parameters, read_config, tokenizer_file
from llama.config import EngineConfig, ModelConfig
from llama.cpu.executor import compile_steps
from llama.errors import ConfigError, TokenizerError
from llama.graphs import GraphExecutor, StepGraph, capture_cuda
from llama.model import Transformer, random_parameters
from llama.runner import Executor, Runner
from llama.tokenizer import Tokenizer

DEMO = Path(__file__).parent / "demo"

# A step of up to this many bytes of weights x rows runs on one thread: with more, each of its small operations would
# wait for the slowest one.
_ONE_THREAD_BYTES = 16 << 20


@dataclass(frozen=True)
class Setup:
    """What `resolve` decided."""

    config: EngineConfig
    model_dir: Path | None  # None: random weights
    model_config: ModelConfig
    tokenizer: Tokenizer | None  # None: the model serves token ids only
    device: torch.device
    dtype: torch.dtype  # of the weights
    batch_invariant: bool
    async_scheduling: bool
    max_seq_len: int  # the context that is served, in tokens
    memory_plan: MemoryPlan
    threads: int  # as `Runner` takes them
    one_thread_rows: int


def resolve(model: str | Path | ModelConfig, config: EngineConfig) -> Setup:
    """Read the model's description and divide the memory. Raises ConfigError, LoadError, TokenizerError."""
    if isinstance(model, ModelConfig):
        folder, shape = None, model
    else:
        folder = find_model(model)
        shape = read_config(folder)
    device = find_device(config.device)
    if config.compile and device.type != "cpu":
        raise ConfigError("compile", True, f"is for the CPU; on {device.type} steps are CUDA graphs")
    dtype = _dtype(config.dtype, shape.dtype, device)
    max_seq_len = min(config.max_seq_len or shape.max_seq_len, shape.max_seq_len)
    # Not the number of threads either may change the bits of a row, so it stays the same then.
    invariant = device.type == "cuda" if config.batch_invariant is None else config.batch_invariant
    memory_plan = plan_memory(shape, config, max_seq_len, dtype, device)
    return Setup(
        config=config,
        model_dir=folder,
        model_config=shape,
        tokenizer=_tokenizer(folder, shape),
        device=device,
        dtype=dtype,
        batch_invariant=invariant,
        async_scheduling=device.type == "cuda" if config.async_scheduling is None else config.async_scheduling,
        max_seq_len=max_seq_len,
        memory_plan=memory_plan,
        threads=config.threads or torch.get_num_threads(),
        one_thread_rows=0 if invariant or config.threads else _ONE_THREAD_BYTES // (shape.n_params * dtype.itemsize),
    )


def build_runner(setup: Setup, progress: bool) -> Runner:
    """Load or draw the weights, allocate the cache, capture the graphs. Called in the engine thread."""
    config, device, dtype, plan = setup.model_config, setup.device, setup.dtype, setup.memory_plan
    if setup.model_dir is None:
        parameters = random_parameters(config, dtype, device)
    else:
        parameters = load_parameters(setup.model_dir, config, dtype, device, progress)
    model = Transformer(config, parameters, setup.max_seq_len, setup.batch_invariant, keep_rows=setup.config.compile)
    with torch.inference_mode():
        cache = KVCache.empty(config, plan.num_blocks, plan.block_size, kernels.cache_dtype(dtype, device), device)
    executors: list[Executor] = []
    if device.type == "cuda" and setup.config.cuda_graphs:
        make = partial(StepGraph, model, cache, capture_cuda())
        graphs = GraphExecutor(make, setup.config.max_batch_seqs, setup.config.max_batch_tokens)
        with torch.inference_mode():
            graphs.capture_all(up_to=setup.config.slots)
        executors.append(graphs)
    if setup.config.compile:
        executors += compile_steps(model, cache, setup.threads, one_thread=setup.one_thread_rows > 0)
    return Runner(model, cache, executors, setup.threads, setup.one_thread_rows)


def find_model(model: str | Path) -> Path:
    """The folder of a model: a path, or 'demo'. Raises ConfigError when there is none."""
    folder = DEMO if str(model) == "demo" else Path(model)
    if not folder.is_dir():
        raise ConfigError("model", str(model), "is not a folder, nor the name 'demo'")
    return folder


def find_device(name: str) -> torch.device:
    """The device of a name as in `EngineConfig.device`. Raises ConfigError for a card that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise ConfigError("device", name, f"this machine has {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", index)
    return torch.device(name)


def _dtype(asked: str, stored: str, device: torch.device) -> torch.dtype:
    if asked == "auto":
        # fp16 sums overflow easily and are slow on CPUs; bf16 keeps the range.
        asked = "float32" if stored == "float16" and device.type == "cpu" else stored
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]


def _tokenizer(folder: Path | None, config: ModelConfig) -> Tokenizer | None:
    path = None if folder is None else tokenizer_file(folder)
    if path is None:
        return None
    tokenizer = Tokenizer(path)
    if (n := tokenizer.vocab_size) != config.vocab_size:
        raise TokenizerError(path, f"has {n} pieces, the model's vocabulary {config.vocab_size}")
    return tokenizer
