"""The same requests with steps in turn and one step ahead: equal tokens, text, reasons and bits of every logprob.

The loop is driven by hand, without threads, so that a seed replays. Each draws requests of all kinds that arrive over
time, some abandoned, some failing, on a pool that may hold little more than one of them; the pool is audited, and
blank blocks of the cache filled with NaN, before every step.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import pytest
import torch

from kernels.transfer import pack, unpack
from llama.batch import LastStep
from llama.blocks import BlockPool
from llama.cache import KVCache
from llama.config import ModelConfig
from llama.detokenizer import Detokenizer
from llama.loop import EngineLoop, Pending
from llama.model import Transformer, random_parameters
from llama.request import Request, SamplingParams
from llama.runner import Runner
from llama.scheduler import Plan, Scheduler
from llama.sequence import FinishReason, Sequence, TokenLogprobs, choice_seed
from llama.setup import DEMO
from llama.stream import Mailbox
from llama.tokenizer import Tokenizer

CPU = torch.device("cpu")
TOKENIZER = Tokenizer(DEMO / "tokenizer.model")
TINY = ModelConfig(32, 2, 4, 2, 8, 48, TOKENIZER.vocab_size, max_seq_len=96)
LONGEST = 64
SEEDS = range(60)


@dataclass
class Job:
    """One request. arrives, leaves: before which step; it fails, or its logits do, at the token number `broken`."""

    request: Request
    arrives: int
    leaves: int | None
    stop_ids: frozenset[int]
    broken: int | None
    nan: bool


@dataclass
class Answer:
    """What came of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None


@pytest.fixture(scope="module")
def model() -> Transformer:
    with torch.inference_mode():
        parameters = random_parameters(TINY, torch.float32, CPU)
        parameters["embedding"] *= 50  # else every token is followed by nearly the same ones
        return Transformer(TINY, parameters, TINY.max_seq_len, batch_invariant=True)


def some_job(rng: random.Random, prefix: list[int]) -> Job:
    length = rng.randrange(1, 30)
    shared = rng.choice([0, rng.randrange(length + 1)])
    prompt = prefix[:shared] + [rng.randrange(3, TINY.vocab_size) for _ in range(length - shared)]
    max_tokens = rng.randrange(0, LONGEST - length) if rng.random() < 0.9 else 0
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, rng.randrange(max_tokens + 1)]),
        temperature=rng.choice([0.0, 1.0]),
        top_p=rng.choice([1.0, 0.9]),
        presence_penalty=rng.choice([0.0, 0.0, 0.0, 1.5]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
        logit_bias=rng.choice([{}, {}, {7: 3.0}]),
        stop=rng.choice([(), ("e",), ("in", "th"), ("\n",)]),
        logprobs=rng.choice([None, 0, 3]),
        prompt_logprobs=rng.choice([None, None, None, 2]),
    )
    return Job(
        Request([prompt], params, n=rng.choice([1, 1, 1, 2, 3])),
        arrives=rng.randrange(25),
        leaves=rng.randrange(40) if rng.random() < 0.15 else None,
        stop_ids=frozenset(rng.sample(range(TINY.vocab_size), rng.choice([1, 1, TINY.vocab_size // 8]))),
        broken=rng.randrange(8) if rng.random() < 0.1 else None,
        nan=rng.random() < 0.5,
    )


@dataclass
class Breaking:
    """A runner in which each job breaks that is to break: by an error, or by logits that are not finite."""

    inner: Runner
    jobs: dict[int, Job]  # by the id of the request

    def launch(self, plan: Plan) -> Pending:
        breaks = []
        for row, i in enumerate(i for i, yields in enumerate(plan.yields) if yields):
            seq = plan.seqs[i]
            job = self.jobs[id(seq.request)]
            if job.broken is not None and plan.firsts[i] + plan.counts[i] - seq.n_prompt == job.broken:
                if not job.nan:
                    raise ValueError("planted")
                breaks.append(row)
        model, plain = self.inner.model, Transformer.logits

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            made = plain(model, hidden)
            made[breaks] = math.nan
            return made

        model.logits = logits  # type: ignore[method-assign]
        try:
            return self.inner.launch(plan)
        finally:
            del model.logits


@dataclass
class Run:
    answers: list[list[Answer]]
    errors: list[str]
    n_vain: int  # rows of sequences that had ended
    n_preemptions: int
    n_hits: int


def serve(model: Transformer, seed: int, ahead: bool) -> Run:
    rng = random.Random(seed)
    prefix = [rng.randrange(3, TINY.vocab_size) for _ in range(30)]
    jobs = [some_job(rng, prefix) for _ in range(10)]
    size = rng.choice([2, 4, 8])
    pool = BlockPool(1 + -(-LONGEST // size) + rng.choice([0, 2, 100]), size, prefix_cache=rng.random() < 0.7)
    scheduler = Scheduler(pool, rng.choice([3, 16, 64]), rng.choice([2, 4, 8]))
    with torch.inference_mode():
        cache = KVCache.empty(TINY, pool.num_blocks, size, torch.float32, CPU)
    runner = Breaking(Runner(model, cache), {id(job.request): job for job in jobs})
    loop = EngineLoop(scheduler, runner, SimpleQueue(), async_scheduling=ahead)
    mailboxes = [Mailbox(job.request.n, None, loop.abort) for job in jobs]
    n_vain = calls = 0

    def audit(loop: EngineLoop) -> None:
        scheduler.check()
        with torch.inference_mode():
            for layer in (*cache.k, *cache.v):
                layer[list(pool._blank)] = math.nan

    loop.on_step = audit
    while calls < 40 or scheduler.has_work or loop.under_way:
        for job, mailbox in zip(jobs, mailboxes, strict=True):
            if job.arrives == calls:
                loop.add(mailbox, sequences(job, pool.prefix_cache))
            if job.leaves == calls and job.leaves > job.arrives:
                mailbox.abandon()
        loop.step()
        assert len(loop.under_way) <= ahead
        n_vain += sum(seq.finish_reason is not None for step in loop.under_way for seq in step.plan.seqs)
        calls += 1
        assert calls < 5000
    assert loop.delivery.tracks == {}
    assert pool.n_free == pool.n_usable
    answers = [gather(mailbox, job.request.n) for job, mailbox in zip(jobs, mailboxes, strict=True)]
    errors = [str(mailbox.error) for mailbox in mailboxes]
    gone = [job.leaves is not None and job.leaves > job.arrives for job in jobs]
    kept = [i for i, left in enumerate(gone) if not left]
    return Run(
        [answers[i] for i in kept], [errors[i] for i in kept], n_vain, scheduler.n_preemptions, scheduler.n_prefix_hits
    )


def sequences(job: Job, prefix_cache: bool) -> list[tuple[Sequence, Detokenizer | None]]:
    made: list[tuple[Sequence, Detokenizer | None]] = []
    request = job.request
    prompt, params = list(request.prompts[0]), request.params
    for j in range(request.n):
        leader = made[0][0] if made and prefix_cache else None
        length = len(prompt) + (params.max_tokens or 0)
        seed = choice_seed(len(prompt), j)
        seq = Sequence(request, j, list(prompt), len(prompt), length, seed, job.stop_ids, leader)
        made.append((seq, Detokenizer(TOKENIZER.vocabulary, skip_first_mark=False, stop=tuple(params.stop))))
    return made


def gather(mailbox: Mailbox, n: int) -> list[Answer]:
    answers = [Answer() for _ in range(n)]
    for delta in mailbox.deltas:
        answer = answers[delta.index]
        assert answer.finish_reason is None, "nothing comes after the end"
        answer.token_ids += delta.token_ids
        answer.text += delta.text
        answer.logprobs += delta.logprobs
        answer.offsets += delta.offsets
        answer.prompt_logprobs = answer.prompt_logprobs or delta.prompt_logprobs
        answer.finish_reason = delta.finish_reason
    return answers


def until_it_failed(run: Run) -> Run:
    """Of a request that fails, how far its other choices came is a matter of timing."""
    for each, error in zip(run.answers, run.errors, strict=True):
        if error != "None":
            each.clear()
    return run


@pytest.mark.slow
def test_one_step_ahead_gives_the_same_answers(model: Transformer) -> None:
    vain = preempted = hits = failed = 0
    reasons = set()
    for seed in SEEDS:
        in_turn, ahead = (until_it_failed(serve(model, seed, ahead)) for ahead in (False, True))
        assert ahead.errors == in_turn.errors, f"seed {seed}"
        assert ahead.answers == in_turn.answers, f"seed {seed}"
        assert in_turn.n_vain == 0
        vain += ahead.n_vain
        preempted += ahead.n_preemptions
        hits += ahead.n_hits
        failed += sum(error != "None" for error in ahead.errors)
        reasons |= {answer.finish_reason for each in ahead.answers for answer in each}
    assert min(vain, preempted, hits, failed) > 20, (vain, preempted, hits, failed)
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}


def test_a_token_that_could_not_be_drawn_indexes_nothing() -> None:
    """On CUDA an index of -1 would cost the device, and with it everybody."""
    tokens = torch.tensor([7, 0, 0])
    LastStep(torch.tensor([5, -1]), []).fill(tokens, torch.tensor([2, 1]), torch.tensor([0, 1]))
    assert tokens.tolist() == [7, 0, 5]


def test_what_is_packed_comes_out_again() -> None:
    """The buffer that inputs travel in; on the CPU they do not travel."""
    arrays = [
        np.arange(5, dtype=np.int64).reshape(1, 5),
        np.empty((0, 2), np.int64),
        np.array([1.5, math.inf, -math.inf], np.float32),
        np.arange(7, dtype=np.int32),
    ]
    packed = pack(arrays, pin_memory=False)
    tensors = unpack(packed, arrays)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.is_contiguous()
        assert not tensor.numel() or (tensor.data_ptr() - packed.data_ptr()) % 16 == 0
