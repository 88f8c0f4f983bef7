"""`EngineLoop`: what the engine thread does. It owns every tensor, the pool and all sequences, and waits for no caller.

Other threads reach it only through `inbox`, a queue of calls to make. A fault in one request ends that request; an
error that cannot be pinned on one ends the engine.

With async_scheduling, step t + 1 is planned and launched before step t is committed and delivered, so that the device
never waits for Python. A step whose tokens the next plan depends on (`Plan.needs_sync`) is read at once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from llama.delivery import Delivery
from llama.detokenizer import Detokenizer
from llama.errors import EngineClosed, EngineDead, RequestFailed
from llama.runner import StepResult
from llama.scheduler import Plan, Scheduler
from llama.sequence import FinishReason, Sequence
from llama.stream import Mailbox

log = logging.getLogger("llama")

# How torch and Triton begin the message of an error after which the device computes nothing any more.
LOST_DEVICE = ("CUDA error", "Triton Error [CUDA]")


class Pending(Protocol):
    def result(self) -> StepResult: ...


class StepRunner(Protocol):
    """What the loop needs of a `Runner`; tests and the overhead bench put a fake one in its place."""

    def launch(self, plan: Plan) -> Pending: ...


class LaunchedStep(NamedTuple):
    """A step under way. started: when it was planned, by time.monotonic()."""

    plan: Plan
    pending: Pending
    started: float


class EngineLoop:
    """on_step: called in the engine thread before every step, for audits and fault injection. step_seconds: moving
    average of step time, weight 0.1."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        inbox: SimpleQueue[Callable[[], None]],
        async_scheduling: bool = False,
    ) -> None:
        self.scheduler, self.runner, self.inbox, self.async_scheduling = scheduler, runner, inbox, async_scheduling
        self.delivery = Delivery(scheduler.finish)
        self.under_way: deque[LaunchedStep] = deque()  # launched and not read; between two calls of `step` at most one
        self.on_step: Callable[[EngineLoop], None] | None = None
        self.closing = False
        self.error: BaseException | None = None
        self.last_beat = time.monotonic()
        self.n_steps = self.n_prompt_tokens = 0
        self.step_seconds = 0.0
        self._last_end = 0.0  # when the last step was delivered

    def run(self) -> None:
        """Serve until `stop` is called through the inbox or an error ends it; every open request then gets an error."""
        try:
            while self._take_messages():
                self.step()
        except BaseException as error:
            log.exception("the engine thread stopped")
            # Without its frames, which would keep the weights and the cache alive.
            self.error = error.with_traceback(None)
            error.__context__ = error.__cause__ = None
        self.closing = True
        self._take_late_messages()
        stopped = f"the engine stopped: {self.error!r}"
        self.delivery.fail_all(EngineDead(stopped) if self.error else EngineClosed("the engine was closed"))
        self.under_way.clear()

    def step(self) -> None:
        """Schedule, launch, commit, deliver."""
        if self.on_step is not None:
            self.on_step(self)
        if not self.scheduler.has_work and not self.under_way:
            return
        started = time.monotonic()
        plan = self.scheduler.schedule()
        if plan.seqs:
            try:
                self.under_way.append(LaunchedStep(plan, self.runner.launch(plan), started))
            except Exception as error:
                self._recover(plan, started, error)
        elif not self.under_way:
            raise RuntimeError("sequences wait, none runs, and none can be admitted")
        n_ahead = 1 if self.async_scheduling and plan.seqs and not plan.needs_sync else 0
        self._read_all_but(n_ahead)

    def expected_wait(self, rank: int = 0) -> float:
        """Seconds until rank + 1 sequences have ended, if steps go on as they do. From any thread.

        Sequences still to come are taken to be as long as the longest one. Without any, or before the first step: 1.
        """
        seqs = [*self.scheduler.running.copy(), *self.scheduler.waiting.copy()]
        left = sorted(seq.max_len - len(seq.token_ids) for seq in seqs)
        if not left or not self.step_seconds:
            return 1.0
        rounds, place = divmod(rank, len(left))
        return max(rounds * left[-1] + left[place], 1) * self.step_seconds

    # Messages; called in the engine thread through the inbox.

    def add(self, mailbox: Mailbox, sequences: list[tuple[Sequence, Detokenizer | None]]) -> None:
        if not mailbox.unfinished:
            return  # abandoned before it arrived
        self.delivery.add(mailbox, sequences)
        self.scheduler.add(seq for seq, _ in sequences)

    def abort(self, mailbox: Mailbox) -> None:
        self._drop(mailbox, FinishReason.ABORT)

    def stop(self) -> None:
        self.closing = True

    def _take_messages(self) -> bool:
        """Handle what callers asked for; sleep while there is nothing to do. False when the loop is to end."""
        if not self.scheduler.has_work and not self.under_way:
            pool = self.scheduler.pool
            if pool.n_free != pool.n_usable:
                raise RuntimeError(f"{pool.n_usable - pool.n_free} blocks are held although no sequence is left")
            self.inbox.get()()
        while not self.closing and not self.inbox.empty():  # nobody else takes messages out
            self.inbox.get()()
        self.last_beat = time.monotonic()
        return not self.closing

    def _take_late_messages(self) -> None:
        """Requests that came in after the message that ended the loop; they get its error like all others."""
        while not self.inbox.empty():
            try:
                self.inbox.get()()
            except Exception:
                log.exception("a message that came after the end of the engine")

    def _read_all_but(self, n_ahead: int) -> None:
        while len(self.under_way) > n_ahead:
            plan, pending, started = self.under_way.popleft()
            self._commit_and_deliver(plan, pending.result(), started)

    def _commit_and_deliver(self, plan: Plan, result: StepResult, started: float) -> None:
        for i, token in enumerate(result.tokens):
            if token == -1:
                result.tokens[i] = None
                self._fail(plan.seqs[i], RequestFailed("nan_logits", "the model's logits are not finite"))
        self.n_prompt_tokens += sum(n for seq, n in zip(plan.seqs, plan.counts, strict=True) if seq.n_generated == 0)
        self.scheduler.commit(plan, result.tokens)
        since = max(started, self._last_end)
        self.delivery.deliver(plan, result, self.n_steps, started, time.monotonic() - since)
        self.n_steps += 1
        self._last_end = self.last_beat = time.monotonic()
        self.step_seconds += (self._last_end - since - self.step_seconds) * (0.1 if self.n_steps > 1 else 1.0)

    def _recover(self, plan: Plan, started: float, error: Exception) -> None:
        """After a launch that raised: run the plan in parts, and end the requests that fail alone."""
        _raise_if_lost(error)
        # Read what is under way first: it may end some of these sequences, and then all tokens are known.
        self._read_all_but(0)
        living = plan.living()
        culprits: list[tuple[Sequence, RequestFailed]] = []
        result = self._run(living, culprits)
        for seq, failure in culprits:  # only now: other choices of the same request may have been in the other half
            self._fail(seq, failure)
        self._commit_and_deliver(living, result, started)

    def _run(self, plan: Plan, culprits: list[tuple[Sequence, RequestFailed]]) -> StepResult:
        """Run the plan. If that raises, halve it until the culprits are alone, and keep the others' results."""
        if not plan.seqs:
            return StepResult([], [])
        try:
            return self.runner.launch(plan).result()
        except Exception as error:
            _raise_if_lost(error)
            if len(plan.seqs) == 1:
                log.exception("a request failed")
                culprits.append((plan.seqs[0], RequestFailed("internal_error", f"the step failed: {error}")))
                return StepResult([None], [None])
        first, second = (self._run(half, culprits) for half in plan.split())
        return StepResult(first.tokens + second.tokens, first.logprobs + second.logprobs)

    def _fail(self, seq: Sequence, error: RequestFailed) -> None:
        """End the whole request that seq belongs to."""
        track = self.delivery.tracks.get(seq)
        if track is not None:
            self._drop(track.mailbox, FinishReason.ERROR)
            track.mailbox.fail(error)

    def _drop(self, mailbox: Mailbox, reason: FinishReason) -> None:
        for seq in self.delivery.drop(mailbox):
            self.scheduler.finish(seq, reason)


def _raise_if_lost(error: Exception) -> None:
    """Raise an error after which the device computes nothing any more."""
    if any(sign in str(error) for sign in LOST_DEVICE):
        raise error
