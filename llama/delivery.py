"""`Delivery`: the text side of the sequences. It turns their tokens into text and hands that to their readers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llama.detokenizer import Detokenizer
from llama.runner import StepResult
from llama.scheduler import Plan
from llama.sequence import FinishReason, Sequence, TokenLogprobs
from llama.stream import Delta, Mailbox, StepTrace


@dataclass(slots=True)
class Track:
    """The text side of one sequence. held: tokens whose place in the text a stop string may still change."""

    mailbox: Mailbox
    detokenizer: Detokenizer | None  # None: the model has no tokenizer, only ids go out
    held: list[tuple[int, TokenLogprobs, int]] = field(default_factory=list)  # (token id, logprobs, offset)
    started: bool = False


class Delivery:
    """finish: ends a sequence whose text has met a stop string. n_tokens: delivered since the start."""

    def __init__(self, finish: Callable[[Sequence, FinishReason], None]) -> None:
        self.tracks: dict[Sequence, Track] = {}
        self.n_tokens = 0
        self._finish = finish

    def add(self, mailbox: Mailbox, sequences: list[tuple[Sequence, Detokenizer | None]]) -> None:
        self.tracks |= {seq: Track(mailbox, detokenizer) for seq, detokenizer in sequences}

    def drop(self, mailbox: Mailbox) -> list[Sequence]:
        """Forget the sequences of a mailbox, and return them."""
        seqs = [seq for seq, track in self.tracks.items() if track.mailbox is mailbox]
        for seq in seqs:
            del self.tracks[seq]
        return seqs

    def fail_all(self, error: BaseException) -> None:
        for mailbox in {track.mailbox for track in self.tracks.values()}:
            mailbox.fail(error)
        self.tracks.clear()

    def deliver(self, plan: Plan, result: StepResult, number: int, started: float, seconds: float) -> None:
        """Turn the tokens of committed step `number` into text, hand them over, then wake each reader once.

        started: when it was planned, by time.monotonic(). seconds: that it took.
        """
        now = time.monotonic()
        mailboxes: dict[Mailbox, None] = {}
        for seq, n, token, logprobs in zip(plan.seqs, plan.counts, result.tokens, result.logprobs, strict=True):
            track = self.tracks.get(seq)
            if track is None:
                continue
            mailbox, stats = track.mailbox, track.mailbox.stats
            if not track.started:
                track.started = True
                stats.first_scheduled = stats.first_scheduled or started
                stats.cached_tokens += seq.num_cached if seq.leader is None else 0
            if stats.steps is not None:
                stats.note_step(StepTrace(number, n, len(plan.seqs), plan.n_tokens, seconds))
            if token is None and seq.finish_reason is None:
                continue
            delta = self._delta(seq, track, token, logprobs)
            self.n_tokens += token is not None
            if seq.finish_reason is not None:
                stats.preemptions += seq.preemptions
                del self.tracks[seq]
            stats.first_token = stats.first_token or now
            mailbox.put(delta)
            mailboxes[mailbox] = None
        for mailbox in mailboxes:
            mailbox.wake()

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
                self._finish(seq, FinishReason.STOP)
                ended = True
        tokens = [] if token is None else [token]
        delta = Delta(seq.index, tokens, text, finish_reason=seq.finish_reason)
        if logprobs is not None:
            track.held.append((logprobs.token_id, logprobs, 0 if detokenizer is None else offset))
            _release(track, delta, ended)
        if seq.params.prompt_logprobs is not None and seq.n_generated <= 1:
            delta.prompt_logprobs = seq.prompt_logprobs
        return delta


def _release(track: Track, delta: Delta, ended: bool) -> None:
    """Move tokens from `held` to the delta: those that no stop string can cut any more."""
    detokenizer, held = track.detokenizer, track.held
    count = len(held)
    if detokenizer is not None and not ended:
        count = next((i for i, (_, _, offset) in enumerate(held) if offset > detokenizer.released), count)
    certain, track.held = held[:count], held[count:]
    delta.token_ids = [token for token, _, _ in certain]
    delta.logprobs = [logprobs for _, logprobs, _ in certain]
    if detokenizer is not None:
        delta.offsets = [min(offset, detokenizer.length) for _, _, offset in certain]
