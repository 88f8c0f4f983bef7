"""The compiled forms of a step as executors of the runner, and what happens when one fails."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from llama.batch import LastStep, Step
from llama.cache import KVCache
from llama.cpu.many_rows import MAX_BLOCK_SIZE, ManyRows
from llama.cpu.one_row import OneRow
from llama.model import Transformer
from llama.runner import PlainExecutor

log = logging.getLogger("llama")


class CompiledExecutor:
    """Runs the steps that `form` serves until one fails, which others can cause who reset the compiler; then plain."""

    def __init__(self, form: OneRow | ManyRows, plain: PlainExecutor) -> None:
        self.form, self.plain, self.failed = form, plain, False

    def serves(self, step: Step) -> bool:
        return not self.failed and self.form.serves(step)

    def run(self, step: Step, last: LastStep | None) -> Tensor | None:
        try:
            return self.form.run(step, last)
        except Exception:
            log.warning("compiled steps failed; from now on they run operator by operator", exc_info=True)
            self.failed = True
            return self.plain.run(step, last)


def compile_steps(model: Transformer, cache: KVCache, threads: int, one_thread: bool) -> list[CompiledExecutor]:
    """Those that torch.compile could make; for others, most often for want of a C++ compiler, a warning in the log.

    threads: CPU threads of one operation; one_thread: steps of one row use one.
    """
    log.info("compiling steps; the first time on a machine this takes up to a minute")
    plain, executors = PlainExecutor(model, cache), []
    for kind in (OneRow, ManyRows) if cache.block_size <= MAX_BLOCK_SIZE else (OneRow,):
        # OneRow compiles its number of threads in.
        torch.set_num_threads(1 if kind is OneRow and one_thread else threads)
        try:
            with torch.inference_mode():
                executors.append(CompiledExecutor(kind(model, cache), plain))
        except Exception as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            log.warning("compile=True: torch.compile failed, steps run operator by operator: %s", reason)
    return executors
