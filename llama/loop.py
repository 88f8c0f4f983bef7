"""`EngineLoop`: what the engine thread does. It owns every tensor, the pool and all sequences, and waits for no caller.

A step is schedule, launch, commit, deliver. Other threads reach it only through `inbox`, a queue of calls to make.
A fault in one request ends that request; an error that cannot be pinned on one ends the engine.

With steps_ahead, the next step is planned and launched before the one before it is read, so that a device that computes
on its own never waits for Python: launch t + 1, then commit and deliver t. A step that must be known before the next is
planned (`Plan.must_be_read`: penalties count the token that it yields) is read at once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Protocol

from llama.detokenizer import Detokenizer
from llama.errors import EngineClosed, EngineDead, RequestFailed
from llama.runner import StepResult
from llama.scheduler import Plan, Scheduler
from llama.sequence import FinishReason, Sequence, TokenLogprobs
from llama.stream import Delta, Mailbox, StepTrace

log = logging.getLogger("llama")

# How torch and Triton begin the message of an error after which the device computes nothing any more.
LOST_DEVICE = ("CUDA error", "Triton Error [CUDA]")


class StepRunner(Protocol):
    """What the loop needs of a `Runner`; tests and the overhead bench put a fake one in its place."""

    def launch(self, plan: Plan) -> Callable[[], StepResult]: ...


@dataclass(slots=True)
class Step:
    """A step under way. result: waits for it. started: when it was planned, by time.monotonic()."""

    plan: Plan
    result: Callable[[], StepResult]
    started: float


@dataclass(slots=True)
class Track:
    """The text side of one sequence. held: tokens whose place in the text a stop string may still change."""

    mailbox: Mailbox
    detokenizer: Detokenizer | None  # None: the model has no tokenizer, only ids go out
    held: list[tuple[int, TokenLogprobs, int]] = field(default_factory=list)  # (token id, logprobs, offset)
    started: bool = False


class EngineLoop:
    """on_step, when set, is called in the engine thread before every step; the seam for audits and fault injection."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        inbox: SimpleQueue[Callable[[], None]],
        steps_ahead: bool = False,
    ) -> None:
        self.scheduler, self.runner, self.inbox, self.steps_ahead = scheduler, runner, inbox, steps_ahead
        self.under_way: deque[Step] = deque()  # launched and not read; between two calls of `step` at most one
        self.tracks: dict[Sequence, Track] = {}
        self.on_step: Callable[[EngineLoop], None] | None = None
        self.closing = False
        self.error: BaseException | None = None
        self.last_beat = time.monotonic()
        self.n_steps = self.n_prompt_tokens = self.n_generated_tokens = 0
        self.step_seconds = 0.0  # of late steps, the last one counting a tenth
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
        reason = (
            EngineDead(f"the engine stopped: {self.error!r}") if self.error else EngineClosed("the engine was closed")
        )
        self.closing = True
        self._take_late_ones()
        for mailbox in {track.mailbox for track in self.tracks.values()}:
            mailbox.fail(reason)
        self.tracks.clear()
        self.under_way.clear()

    def step(self) -> None:
        if self.on_step is not None:
            self.on_step(self)
        if not self.scheduler.has_work and not self.under_way:
            return
        started = time.monotonic()
        plan = self.scheduler.schedule()
        if plan.seqs:
            self._launch(plan, started)
        elif not self.under_way:
            raise RuntimeError("sequences wait, none runs, and none can be admitted")
        unread = 1 if self.steps_ahead and plan.seqs and not plan.must_be_read else 0
        while len(self.under_way) > unread:
            step = self.under_way.popleft()
            self._finish(step.plan, step.result(), step.started)

    def expected_wait(self, rank: int = 0) -> float:
        """Seconds until rank + 1 sequences have ended, if steps go on as they do. From any thread.

        Beyond those that are known, the next ones are taken to be as long; with none known, or before the first step
        has told how long one takes, it is a second.
        """
        seqs = [*self.scheduler.running.copy(), *self.scheduler.waiting.copy()]
        left = sorted([seq.max_len - len(seq.token_ids) for seq in seqs])
        if not left or not self.step_seconds:
            return 1.0
        rounds, place = divmod(rank, len(left))
        return max(rounds * left[-1] + left[place], 1) * self.step_seconds

    # Messages; called in the engine thread through the inbox.

    def add(self, mailbox: Mailbox, sequences: list[tuple[Sequence, Detokenizer | None]]) -> None:
        if not mailbox.unfinished:
            return  # abandoned before it arrived
        for seq, detokenizer in sequences:
            self.tracks[seq] = Track(mailbox, detokenizer)
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
        while not self.closing:
            try:
                message = self.inbox.get_nowait()
            except Empty:
                break
            message()
        self.last_beat = time.monotonic()
        return not self.closing

    def _take_late_ones(self) -> None:
        """Requests that came in behind the message that ended the loop; they get its error like all others."""
        while True:
            try:
                self.inbox.get_nowait()()
            except Empty:
                return
            except Exception:
                log.exception("a message that came after the end of the engine")

    def _launch(self, plan: Plan, started: float) -> None:
        try:
            self.under_way.append(Step(plan, self.runner.launch(plan), started))
            return
        except Exception as error:
            _raise_if_lost(error)
        # Read what is under way first: it may end some of these sequences, and then all tokens are known.
        while self.under_way:
            step = self.under_way.popleft()
            self._finish(step.plan, step.result(), step.started)
        living = plan.living()
        culprits: list[tuple[Sequence, RequestFailed]] = []
        result = self._run(living, culprits)
        for seq, failure in culprits:  # only now: other choices of the same request may have been in the other half
            self._fail(seq, failure)
        self._finish(living, result, started)

    def _finish(self, plan: Plan, result: StepResult, started: float) -> None:
        """Commit and deliver a step that has been computed."""
        self._fail_non_finite(plan, result)
        self.n_prompt_tokens += sum(n for seq, n in zip(plan.seqs, plan.counts, strict=True) if seq.n_generated == 0)
        self.scheduler.commit(plan, result.tokens)
        self._deliver(plan, result, started)
        self.n_steps += 1
        now = self.last_beat = time.monotonic()
        seconds = now - max(started, self._last_end)
        self.step_seconds += (seconds - self.step_seconds) * (0.1 if self.n_steps > 1 else 1.0)
        self._last_end = now

    def _run(self, plan: Plan, culprits: list[tuple[Sequence, RequestFailed]]) -> StepResult:
        """Run the plan. If that raises, halve it until the culprits are alone, and keep the others' results."""
        if not plan.seqs:
            return StepResult([], [])
        try:
            return self.runner.launch(plan)()
        except Exception as error:
            _raise_if_lost(error)
            if len(plan.seqs) == 1:
                log.exception("a request failed")
                culprits.append((plan.seqs[0], RequestFailed("internal_error", f"the step failed: {error}")))
                return StepResult([None], [None])
        first, second = (self._run(half, culprits) for half in plan.split())
        return StepResult(first.tokens + second.tokens, first.logprobs + second.logprobs)

    def _fail_non_finite(self, plan: Plan, result: StepResult) -> None:
        for i, token in enumerate(result.tokens):
            if token == -1:
                result.tokens[i] = None
                self._fail(plan.seqs[i], RequestFailed("nan_logits", "the model's logits are not finite"))

    def _fail(self, seq: Sequence, error: RequestFailed) -> None:
        """End the whole request that seq belongs to."""
        track = self.tracks.get(seq)
        if track is not None:
            self._drop(track.mailbox, FinishReason.ERROR)
            track.mailbox.fail(error)

    def _drop(self, mailbox: Mailbox, reason: FinishReason) -> None:
        for seq in [seq for seq, track in self.tracks.items() if track.mailbox is mailbox]:
            self.scheduler.finish(seq, reason)
            del self.tracks[seq]

    def _deliver(self, plan: Plan, result: StepResult, started: float) -> None:
        """Turn the step's tokens into text, hand them over, then wake each reader once."""
        now = time.monotonic()
        mailboxes: dict[Mailbox, None] = {}
        for i, (seq, token, logprobs) in enumerate(zip(plan.seqs, result.tokens, result.logprobs, strict=True)):
            track = self.tracks.get(seq)
            if track is None:
                continue
            mailbox = track.mailbox
            if not track.started:
                self._start(seq, track, started)
            if mailbox.stats.steps is not None:
                seconds = now - max(started, self._last_end)
                step = StepTrace(self.n_steps, plan.counts[i], len(plan.seqs), plan.n_tokens, seconds)
                mailbox.stats.note_step(step)
            if token is None and seq.finish_reason is None:
                continue
            delta = self._delta(seq, track, token, logprobs)
            self.n_generated_tokens += token is not None
            if seq.finish_reason is not None:
                mailbox.stats.preemptions += seq.preemptions
                del self.tracks[seq]
            mailbox.stats.first_token = mailbox.stats.first_token or now
            mailbox.put(delta)
            mailboxes[mailbox] = None
        for mailbox in mailboxes:
            mailbox.wake()

    def _start(self, seq: Sequence, track: Track, now: float) -> None:
        track.started = True
        stats = track.mailbox.stats
        stats.first_scheduled = stats.first_scheduled or now
        if seq.leader is None:
            stats.cached_tokens += seq.num_cached

    def _delta(self, seq: Sequence, track: Track, token: int | None, logprobs: TokenLogprobs | None) -> Delta:
        """What the sequence gained in this step; finds stop strings, which end it."""
        detokenizer, text = track.detokenizer, ""
        matching = seq.n_generated > seq.params.min_tokens
        ended = seq.finish_reason is not None
        if detokenizer is not None:
            offset = detokenizer.length
            if token is not None and not (ended and token in seq.stop_ids and matching):
                text = detokenizer.push(token, matching)
                offset = detokenizer.offset
            if ended and not detokenizer.stopped:
                text += detokenizer.finish(matching)
            if detokenizer.stopped:
                self.scheduler.finish(seq, FinishReason.STOP)
                ended = True
        tokens = [] if token is None else [token]
        delta = Delta(seq.index, tokens, text, finish_reason=seq.finish_reason)
        if logprobs is not None:
            track.held.append((logprobs.token_id, logprobs, 0 if detokenizer is None else offset))
            self._release(track, delta, ended)
        if seq.params.prompt_logprobs is not None and seq.n_generated <= 1:
            delta.prompt_logprobs = seq.prompt_logprobs
        return delta

    def _release(self, track: Track, delta: Delta, ended: bool) -> None:
        """Let the tokens go whose offsets are certain: nothing that a stop string may still cut lies before them."""
        detokenizer, held = track.detokenizer, track.held
        count = len(held)
        if detokenizer is not None and not ended:
            count = next((i for i, (_, _, offset) in enumerate(held) if offset > detokenizer.released), count)
        out, track.held = held[:count], held[count:]
        delta.token_ids = [token for token, _, _ in out]
        delta.logprobs = [logprobs for _, logprobs, _ in out]
        if detokenizer is not None:
            delta.offsets = [min(offset, detokenizer.length) for _, _, offset in out]


def _raise_if_lost(error: Exception) -> None:
    """Raise an error after which the device computes nothing any more."""
    if any(sign in str(error) for sign in LOST_DEVICE):
        raise error
