"""`Engine`: a model being served in this process. Any thread may call it; one thread of its own does the work."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch
from tqdm import tqdm

from llama.blocks import BlockPool
from llama.config import EngineConfig, Limits, ModelConfig
from llama.detokenizer import Detokenizer
from llama.errors import EngineClosed, EngineDead, InvalidRequest
from llama.loop import EngineLoop
from llama.request import Request, SamplingParams, check_request
from llama.scheduler import Scheduler
from llama.sequence import FinishReason, Sequence, TokenLogprobs, choice_seed
from llama.setup import Setup, build_runner, resolve
from llama.slots import Seat, Slots
from llama.stream import Mailbox, Stream

log = logging.getLogger("llama")


@dataclass(slots=True)
class Completion:
    """One finished sequence of `Engine.generate`. logprobs: one entry per token, when asked for."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason
    prompt_logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Tokens are counted since the start; heartbeat_age: seconds since the engine thread last moved."""

    slots: int
    slots_in_use: int
    running: int
    waiting: int
    blocks: int
    blocks_free: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    heartbeat_age: float


class Engine:
    """Loads a model and serves it until `close()`, the end of the `with` block, or the end of the process.

    model: a checkpoint folder, "demo" for the one that ships with the project, or a ModelConfig for random weights of
    that shape, which has no tokenizer: prompts are token ids. limits: what one request may ask. max_seq_len: the
    context that is served, in tokens. The memory plan is logged before anything is allocated.
    Raises ConfigError, LoadError, CheckpointError, TokenizerError.
    """

    def __init__(
        self,
        model: str | Path | ModelConfig,
        config: EngineConfig | None = None,
        *,
        progress: bool = True,
        limits: Limits | None = None,
    ) -> None:
        self.setup = setup = resolve(model, config or EngineConfig())
        self.model_dir, self.model_config, self.tokenizer = setup.model_dir, setup.model_config, setup.tokenizer
        self.max_seq_len, self.memory_plan = setup.max_seq_len, setup.memory_plan
        self.limits = limits or Limits()
        self._max_cached = self.memory_plan.kv_tokens
        log.info("%s", self.memory_plan)
        self.slots = Slots(setup.config.slots)
        self._pid = os.getpid()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        started: SimpleQueue[EngineLoop | BaseException] = SimpleQueue()
        args = setup, progress, self._inbox, self.slots, started
        self._thread = threading.Thread(target=_thread_main, args=args, name="llama-engine", daemon=True)
        self._thread.start()
        try:
            loop = started.get()
        except BaseException:  # an interrupt while it loads: the thread ends by itself when it has
            self._inbox.put(partial(_stop_unclaimed, started))
            raise
        if isinstance(loop, BaseException):
            self._thread.join()
            raise loop
        self._loop = loop
        self.slots.expected_wait = loop.expected_wait
        # Also runs at interpreter exit, where a daemon thread inside torch would otherwise be cut off mid-step.
        self._closer = weakref.finalize(self, _close, self.slots, self._inbox, loop, self._thread)

    def submit(self, request: Request, *, wait: float | bool | None = None, seat: Seat | None = None) -> Stream:
        """Queue a request; its tokens come out of the returned stream.

        seat: a slot already taken from `slots`; None: one is taken here, with `wait` as in `Slots.acquire`.
        Raises InvalidRequest, ContextLengthExceeded, SlotsFull, EngineClosed, EngineDead; the seat is given back then.
        """
        try:
            self._check_alive()
            self._check(request)
            if seat is None:
                seat = self.slots.acquire(wait)
        except BaseException as error:
            if seat is not None:
                seat.release()
            if isinstance(error, EngineClosed):
                self._check_alive()  # raises the error that ended the engine, if it was one
            raise
        mailbox = Mailbox(len(request.prompts) * request.n, seat, self._abort)
        mailbox.stats.steps = [] if request.trace else None
        # Before anything is queued: whatever interrupts us now, dropping the stream aborts the request.
        stream = Stream(mailbox)
        self._inbox.put(partial(self._loop.add, mailbox, self._sequences(request)))
        try:
            self._check_alive()
        except (EngineClosed, EngineDead) as error:  # it ended while the request came in
            mailbox.fail(error)
            raise
        return stream

    def generate(
        self,
        prompts: SequenceOf[str | SequenceOf[int]],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue every prompt (text or token ids) and return the answers in order; the offline batch.

        params: one for all, or one per prompt. All prompts are checked first, then they line up for the slots.
        """
        if isinstance(prompts, str | bytes):
            raise InvalidRequest("prompts", prompts, "must be a list of prompts, not one")
        each = list(params) if isinstance(params, SequenceOf) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise InvalidRequest("params", len(each), f"must be one, or one for each of the {len(prompts)} prompts")
        requests = [Request([self.encode(text)], chosen) for text, chosen in zip(prompts, each, strict=True)]
        for request in requests:
            self._check(request)
        with ExitStack() as opened:
            streams = [opened.enter_context(self.submit(request, wait=True)) for request in requests]
            bar = tqdm(zip(streams, requests, strict=True), total=len(requests), disable=not progress, unit="prompt")
            return [_collect(stream, list(request.prompts[0])) for stream, request in bar]

    def encode(self, prompt: str | SequenceOf[int]) -> list[int]:
        """Prompt ids of a text (with BOS), or the ids themselves. Raises InvalidRequest."""
        if isinstance(prompt, bytes) or not isinstance(prompt, SequenceOf):
            raise InvalidRequest("prompt", prompt, "must be a text or a list of token ids")
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise InvalidRequest("prompt", prompt, "this model has no tokenizer; prompts must be token ids")
        return self.tokenizer.encode_prompt(prompt, max_tokens=self.max_seq_len)

    def stats(self) -> EngineStats:
        loop, scheduler = self._loop, self._loop.scheduler
        return EngineStats(
            slots=self.slots.limit,
            slots_in_use=self.slots.in_use,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks=scheduler.pool.n_usable,
            blocks_free=scheduler.pool.n_free,
            steps=loop.n_steps,
            prompt_tokens=loop.n_prompt_tokens,
            generated_tokens=loop.delivery.n_tokens,
            preemptions=scheduler.n_preemptions,
            prefix_queries=scheduler.n_prefix_queries,
            prefix_hits=scheduler.n_prefix_hits,
            heartbeat_age=time.monotonic() - loop.last_beat,
        )

    def expected_wait(self, rank: int = 0) -> float:
        """Seconds until slots may be free for rank + 1 more requests, if nobody else takes them. From any thread."""
        return self._loop.expected_wait(rank)

    @property
    def serving(self) -> bool:
        """False once the engine was closed, or stopped on an error."""
        return not self._loop.closing

    def close(self) -> None:
        """Abort what runs, stop the thread and free the memory. Safe to call twice and from any thread."""
        self._closer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, request: Request) -> None:
        check_request(request, self.model_config.vocab_size, self.max_seq_len, self._max_cached, self.limits)
        stop = request.params.stop
        if stop and self.tokenizer is None:
            raise InvalidRequest("stop", list(stop), "this model has no tokenizer; use stop_token_ids")

    def _sequences(self, request: Request) -> list[tuple[Sequence, Detokenizer | None]]:
        params, sequences = request.params, []
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(self.model_config.eos_ids)
        for p, prompt in enumerate(request.prompts):
            # A given seed gives the same answer wherever the prompt is in the list.
            seed = secrets.randbits(63) if params.seed is None else params.seed
            room = self.max_seq_len if params.max_tokens is None else len(prompt) + params.max_tokens
            leader: Sequence | None = None
            for j in range(request.n):
                seq = Sequence(
                    request=request,
                    index=p * request.n + j,
                    token_ids=list(prompt),
                    n_prompt=len(prompt),
                    max_len=min(room, self.max_seq_len),
                    seed=choice_seed(seed, j),
                    stop_ids=stop_ids,
                    leader=leader,
                )
                leader = leader or (seq if self.setup.config.prefix_cache else None)
                sequences.append((seq, self._detokenizer(request, prompt)))
        return sequences

    def _detokenizer(self, request: Request, prompt: SequenceOf[int]) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        skip = request.chat or self.tokenizer.vocabulary.is_blank(prompt)
        return Detokenizer(self.tokenizer.vocabulary, skip_first_mark=skip, stop=tuple(request.params.stop))

    def _abort(self, mailbox: Mailbox) -> None:
        self._inbox.put(partial(self._loop.abort, mailbox))

    def _check_alive(self) -> None:
        """Raises EngineDead or EngineClosed if nothing will be served any more."""
        if os.getpid() != self._pid:
            raise EngineDead("this engine was made before fork(); make one in the child process")
        if self._loop.error is not None:
            raise EngineDead(f"the engine stopped: {self._loop.error!r}")
        if self._loop.closing:
            raise EngineClosed("the engine is closed")


def _thread_main(
    setup: Setup,
    progress: bool,
    inbox: SimpleQueue[Callable[[], None]],
    slots: Slots,
    started: SimpleQueue[EngineLoop | BaseException],
) -> None:
    """The engine thread. It loads the weights itself, so that it owns every tensor."""
    config, plan = setup.config, setup.memory_plan
    try:
        if setup.device.type == "cuda":
            torch.cuda.set_device(setup.device)  # Triton launches on the thread's current device
        pool = BlockPool(plan.num_blocks, plan.block_size, config.prefix_cache)
        scheduler = Scheduler(pool, config.max_batch_tokens, config.max_batch_seqs)
        loop = EngineLoop(scheduler, build_runner(setup, progress), inbox, setup.async_scheduling)
    except BaseException as error:
        started.put(error)
        return
    started.put(loop)
    loop.run()
    slots.close()
    del loop.runner  # the weights and the cache go with it
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _stop_unclaimed(started: SimpleQueue[EngineLoop | BaseException]) -> None:
    """In the engine thread, when nobody waited for the loop to start."""
    loop = started.get_nowait()
    if isinstance(loop, EngineLoop):
        loop.stop()


def _close(slots: Slots, inbox: SimpleQueue[Callable[[], None]], loop: EngineLoop, thread: threading.Thread) -> None:
    slots.close()
    inbox.put(loop.stop)
    if thread is not threading.current_thread():
        thread.join()


def _collect(stream: Stream, prompt_ids: list[int]) -> Completion:
    """Read a stream of one sequence to its end."""
    done = Completion(prompt_ids, [], "", [], FinishReason.ERROR)
    for delta in stream:
        done.token_ids += delta.token_ids
        done.text += delta.text
        done.logprobs += delta.logprobs
        done.prompt_logprobs = delta.prompt_logprobs if delta.prompt_logprobs is not None else done.prompt_logprobs
        done.finish_reason = delta.finish_reason or done.finish_reason
    return done
