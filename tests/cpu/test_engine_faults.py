"""What goes wrong in one request ends that request only: the others get the same bits, slots and blocks come back.

The model is tiny and random, batch-invariant, so that "undisturbed" means equal bits. The pool is audited before every
step, and every blank block of the cache is filled with NaN: reading one would show at once.
"""

from __future__ import annotations

import gc
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import pytest
import torch
from torch import Tensor

from llama import Engine, EngineConfig, ModelConfig, Request, SamplingParams, Stream
from llama.errors import EngineClosed, EngineDead, InvalidRequest, RequestFailed, SlotsFull
from llama.loop import EngineLoop, Pending, StepRunner
from llama.runner import Runner
from llama.scheduler import Plan
from llama.sequence import FinishReason, TokenLogprobs

VOCAB = 61
TINY = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=VOCAB, max_seq_len=96,
    dtype="float32",
)  # fmt: skip
BLOCK_BYTES = 2 * 2 * 8 * 16 * 4  # keys and values, layers, block size, kv_dim, fp32
CULPRIT = 60  # first token of the prompt that goes wrong
OPTIONS: dict[str, bool] = {}  # of every engine that is made


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Closing an engine collects garbage; what the imports brought along need not be gone through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "ahead"])
def async_scheduling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds as well when a step is launched before the one before it is read."""
    monkeypatch.setitem(OPTIONS, "async_scheduling", request.param)


@dataclass
class Answer:
    """One sequence as its reader saw it; `ends` counts terminal events."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ends: list[FinishReason] = field(default_factory=list)


def read(stream: Stream, n: int = 1) -> list[Answer]:
    answers = [Answer() for _ in range(n)]
    for delta in stream:
        answer = answers[delta.index]
        assert not answer.ends, "nothing comes after the end"
        answer.token_ids += delta.token_ids
        answer.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            answer.ends.append(delta.finish_reason)
    assert all(len(answer.ends) == 1 for answer in answers)
    return answers


@torch.inference_mode()  # as the cache was made
def audit(loop: EngineLoop) -> None:
    """Before every step: the pool against all tables, and NaN wherever nobody's K/V are."""
    scheduler = loop.scheduler
    scheduler.check()
    cache = runner_of(loop).cache
    blank = list(scheduler.pool._blank)
    for layer in (*cache.k, *cache.v):
        layer[blank] = math.nan
        assert not layer[0].any(), "the pad block stays zero"


def runner_of(loop: EngineLoop) -> Runner:
    runner = loop.runner
    while not isinstance(runner, Runner):
        runner = runner.inner  # type: ignore[attr-defined]
    return runner


@contextmanager
def engine_with(*, blocks: int = 200, **options: object) -> Iterator[Engine]:
    """An engine that must be idle and whole at the end."""
    config = EngineConfig(
        block_size=8, kv_memory=blocks * BLOCK_BYTES, batch_invariant=True, **OPTIONS, **options  # type: ignore[arg-type]
    )  # fmt: skip
    with Engine(TINY, config, progress=False) as engine:
        engine._loop.on_step = audit
        yield engine
        assert_idle(engine)


@pytest.fixture
def engine(async_scheduling: None) -> Iterator[Engine]:
    with engine_with() as engine:
        yield engine


def assert_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 10
    while engine.stats().blocks_free != engine.stats().blocks:
        assert time.monotonic() < deadline, engine.stats()
        time.sleep(0.001)
    stats = engine.stats()
    assert (stats.slots_in_use, stats.running, stats.waiting) == (0, 0, 0)
    assert engine._loop.delivery.tracks == {}
    assert engine._loop.error is None


@dataclass
class Job:
    prompt: list[int]
    params: SamplingParams
    n: int = 1

    def submit(self, engine: Engine) -> Stream:
        return engine.submit(Request([self.prompt], self.params, n=self.n), wait=True)


def job(i: int, max_tokens: int = 12, first: int = 1) -> Job:
    """All kinds of parameters; the same for the same i."""
    rng = random.Random(i)
    prompt = [first, *(rng.randrange(3, 50) for _ in range(rng.randrange(1, 30)))]
    fields: dict[str, object] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": i},
        {"temperature": 1.3, "seed": i, "top_k": 9, "min_p": 0.01},
        {"temperature": 0.7, "seed": i, "top_p": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 1.0, "seed": i, "repetition_penalty": 1.5, "logit_bias": {5: 2.0, 6: -100.0}},
    ][i % 5]
    return Job(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=3, **fields))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[[Job], list[Answer]]]:
    """The answers of a job that has the engine to itself: no prefix cache, nothing else running."""
    config = EngineConfig(block_size=16, batch_invariant=True, prefix_cache=False, kv_memory=1 << 20)
    with Engine(TINY, config, progress=False) as engine:
        yield lambda job: read(job.submit(engine), job.n)


@dataclass
class Faulty:
    """A runner that calls `fault` before each plan."""

    inner: StepRunner
    fault: Callable[[Plan], None]

    def launch(self, plan: Plan) -> Pending:
        self.fault(plan)
        return self.inner.launch(plan)


def n_before(plan: Plan, i: int) -> int:
    """Tokens generated before the one that the plan's i-th sequence yields, read by now or not."""
    return plan.firsts[i] + plan.counts[i] - plan.seqs[i].n_prompt


def sampled(plan: Plan) -> list[int]:
    """Places of the sequences that yield a token, in the order of their logits."""
    return [i for i, yields in enumerate(plan.yields) if yields]


def culprit_at(plan: Plan, n_generated: int) -> bool:
    seqs = enumerate(plan.seqs)
    return any(seq.token_ids[0] == CULPRIT and n_before(plan, i) == n_generated for i, seq in seqs)


def check_bystanders(engine: Engine, alone: Callable[[Job], list[Answer]], place: int, reason: str) -> None:
    """Nine jobs, of which the one at `place` is to fail."""
    jobs = [job(i, first=CULPRIT if i == place else 1) for i in range(9)]
    streams = [j.submit(engine) for j in jobs]
    for i, (j, stream) in enumerate(zip(jobs, streams, strict=True)):
        if i == place:
            with pytest.raises(RequestFailed) as caught:
                read(stream)
            assert caught.value.reason == reason
            assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, Exception)
        else:
            assert read(stream) == alone(j)
    assert_idle(engine)


@pytest.mark.parametrize("place", [0, 3, 8])
@pytest.mark.parametrize("n_generated", [0, 1, 5])
def test_a_step_that_raises_fails_the_culprit_only(
    engine: Engine, alone: Callable[[Job], list[Answer]], place: int, n_generated: int
) -> None:
    def fault(plan: Plan) -> None:
        if culprit_at(plan, n_generated):
            raise ValueError("bad row")

    engine._loop.runner = Faulty(engine._loop.runner, fault)
    check_bystanders(engine, alone, place, "internal_error")
    # Served as before, by the same engine.
    assert read(job(20).submit(engine)) == alone(job(20))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place, n_generated", [(0, 0), (4, 3), (8, 7)])
def test_logits_that_are_not_finite_fail_their_request_only(
    engine: Engine, alone: Callable[[Job], list[Answer]], value: float, place: int, n_generated: int
) -> None:
    model = runner_of(engine._loop).model
    logits_of = model.logits
    bad_rows: list[int] = []

    def fault(plan: Plan) -> None:
        bad_rows[:] = [
            row
            for row, i in enumerate(sampled(plan))
            if plan.seqs[i].token_ids[0] == CULPRIT and n_before(plan, i) == n_generated
        ]

    def logits(hidden: Tensor) -> Tensor:
        made = logits_of(hidden)
        made[bad_rows] = value
        return made

    model.logits = logits  # type: ignore[method-assign]
    engine._loop.runner = Faulty(engine._loop.runner, fault)
    check_bystanders(engine, alone, place, "nan_logits")


def test_one_not_a_number_among_good_logits_is_enough(engine: Engine) -> None:
    model = runner_of(engine._loop).model
    logits_of = model.logits

    def logits(hidden: Tensor) -> Tensor:
        made = logits_of(hidden)
        made[:, 7] = math.nan
        return made

    model.logits = logits  # type: ignore[method-assign]
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=1.0, top_k=5, top_p=0.5)):
        with pytest.raises(RequestFailed, match="not finite"):
            read(engine.submit(Request([[1, 2, 3]], params)))


def test_a_failing_choice_takes_its_request_with_it(engine: Engine, alone: Callable[[Job], list[Answer]]) -> None:
    """The plan is [choice 0, bystander, a chunk of choice 1]. Choice 0 fails while the second half is still to run; the
    chunk must not be computed with blocks that are already given back (the audit sees it in the pad block)."""
    plans: list[list[int]] = []
    both_are_there = threading.Event()

    def on_step(loop: EngineLoop) -> None:
        both_are_there.wait()
        audit(loop)

    def fault(plan: Plan) -> None:
        plans.append(plan.counts)
        # Choice 1 starts when the prompt is known to be computed.
        at = 2 if OPTIONS["async_scheduling"] else 1
        if any(s.token_ids[0] == CULPRIT and s.index == 0 and n_before(plan, i) == at for i, s in enumerate(plan.seqs)):
            raise ValueError("bad row")

    engine._loop.on_step = on_step
    engine._loop.runner = Faulty(engine._loop.runner, fault)
    bad = Job([CULPRIT, *range(3, 16)], SamplingParams(max_tokens=20, ignore_eos=True), n=2).submit(engine)
    other = Job([1, *range(3, 40)], SamplingParams(max_tokens=12, seed=1, logprobs=0))
    good = other.submit(engine)
    both_are_there.set()
    with pytest.raises(RequestFailed):
        list(bad)
    assert read(good) == alone(other)
    assert [1, 1, 6] in plans


def test_an_error_that_does_not_come_again_fails_nobody(engine: Engine, alone: Callable[[Job], list[Answer]]) -> None:
    """Such as memory that was short for the whole batch: the halves fit. What the failed try wrote does no harm."""

    class Fails(Faulty):
        def launch(self, plan: Plan) -> Pending:
            result = self.inner.launch(plan)
            if len(plan.seqs) > 3:
                raise MemoryError("too many")
            return result

    engine._loop.runner = Fails(engine._loop.runner, lambda plan: None)
    jobs = [job(i) for i in range(8)]
    scored = engine.submit(
        Request([[1, 2, 3, 4]], SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=0, ignore_eos=True))
    )
    streams = [j.submit(engine) for j in jobs]
    assert [read(stream) for stream in streams] == [alone(j) for j in jobs]
    prompt_logprobs = [delta.prompt_logprobs for delta in scored if delta.prompt_logprobs is not None]
    assert [[entry.token_id for entry in entries] for entries in prompt_logprobs] == [[2, 3, 4]]


@pytest.mark.parametrize("prompts", ["text", b"text", [5], [None], [b"ab"], [{1: 2}], [[None]], [["a"]], ["text"]])
def test_prompts_of_the_wrong_type_are_refused(engine: Engine, prompts: object) -> None:
    """One text is no list of prompts: it would be continued once for each character."""
    with pytest.raises(InvalidRequest) as caught:
        engine.generate(prompts)  # type: ignore[arg-type]
    assert caught.value.field in ("prompt", "prompts")


# --- aborts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stage", range(12))
def test_an_abort_at_any_stage(alone: Callable[[Job], list[Answer]], stage: int, n: int) -> None:
    """Before step `stage` the stream is closed; before the next one, every trace of it is gone."""
    with engine_with(max_batch_tokens=16, max_batch_seqs=5) as engine:
        victim_job = Job([CULPRIT, *range(3, 43)], SamplingParams(max_tokens=6, ignore_eos=True), n)
        closed_at: list[int] = []
        hold = threading.Event()

        def on_step(loop: EngineLoop) -> None:
            hold.wait()
            audit(loop)
            if loop.n_steps >= stage and not closed_at:
                streams[0].close()
                streams[0].close()
                closed_at.append(loop.n_steps)
                assert engine.stats().slots_in_use == 4, "its slot is free at once"
            elif closed_at:
                assert not any(seq.token_ids[0] == CULPRIT for seq in loop.delivery.tracks)
                scheduler = loop.scheduler
                assert not any(s.token_ids[0] == CULPRIT for s in (*scheduler.running, *scheduler.waiting))

        engine._loop.on_step = on_step
        jobs = [job(i) for i in range(4)]
        streams = [victim_job.submit(engine), *(j.submit(engine) for j in jobs)]
        hold.set()
        assert [read(stream) for stream in streams[1:]] == [alone(j) for j in jobs]
        assert len(closed_at) == 1
        assert list(streams[0]) == []


def test_an_abort_while_the_step_runs(engine: Engine, alone: Callable[[Job], list[Answer]]) -> None:
    def fault(plan: Plan) -> None:
        if culprit_at(plan, 3):
            bad.close()

    engine._loop.runner = Faulty(engine._loop.runner, fault)
    bad = Job([CULPRIT, 4, 5], SamplingParams(max_tokens=90, ignore_eos=True)).submit(engine)
    good = job(2).submit(engine)
    assert read(good) == alone(job(2))
    assert list(bad) == []


def test_an_abort_in_the_step_that_ends_it(engine: Engine) -> None:
    def fault(plan: Plan) -> None:
        if culprit_at(plan, 3):
            stream.close()

    engine._loop.runner = Faulty(engine._loop.runner, fault)
    stream = Job([CULPRIT, 4, 5], SamplingParams(max_tokens=4, ignore_eos=True)).submit(engine)
    assert not any(delta.finish_reason for delta in stream)
    stream.close()


def test_an_abort_of_a_preempted_request(engine: Engine, alone: Callable[[Job], list[Answer]]) -> None:
    def on_step(loop: EngineLoop) -> None:
        audit(loop)
        if loop.n_steps == 4:
            assert loop.scheduler.preempt_youngest() in loop.delivery.tracks
            streams[-1].close()

    engine._loop.on_step = on_step
    jobs = [job(i) for i in range(3)]
    streams = [j.submit(engine) for j in jobs]
    assert [read(stream) for stream in streams[:-1]] == [alone(j) for j in jobs[:-1]]


# --- many at once -----------------------------------------------------------------------------------------------


def test_sixty_threads_on_thirty_slots(alone: Callable[[Job], list[Answer]]) -> None:
    """Never more than 30 in flight, each request ends exactly once with its own answer, everything comes back."""
    full = threading.Event()
    with engine_with(slots=30, blocks=120, max_batch_tokens=64) as engine:

        def on_step(loop: EngineLoop) -> None:
            audit(loop)
            assert len({id(track.mailbox) for track in loop.delivery.tracks.values()}) <= 30
            assert engine.slots.in_use <= 30
            if not full.is_set():
                deadline = time.monotonic() + 10
                while engine.slots.in_use < 30:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                with pytest.raises(SlotsFull):
                    engine.submit(Request([[1]], SamplingParams()))
                full.set()

        def work(i: int) -> list[Answer]:
            j = job(i, max_tokens=8)
            if i % 2:
                return read(j.submit(engine))
            while True:  # the others knock until they are let in
                try:
                    return read(engine.submit(Request([j.prompt], j.params)))
                except SlotsFull:
                    time.sleep(0.005)

        engine._loop.on_step = on_step
        with ThreadPoolExecutor(60) as pool:
            answers = list(pool.map(work, range(60)))
        assert answers == [alone(job(i, max_tokens=8)) for i in range(60)]
        assert_idle(engine)
        assert engine.stats().generated_tokens == 60 * 8
    assert full.is_set()


@pytest.mark.parametrize("seed", range(4))
def test_a_pool_half_the_demand_with_aborts_and_preemption(alone: Callable[[Job], list[Answer]], seed: int) -> None:
    """Shared prefixes, choices, cancels and a preemption now and then: what is not cancelled has the bits of a run
    alone."""
    rng = random.Random(seed)
    prefix = [1, *(rng.randrange(3, 50) for _ in range(40))]

    def mixed(i: int) -> Job:
        made = job(1000 * seed + i, max_tokens=rng.randrange(1, 20))
        if i % 3 == 0:
            made.prompt = prefix[: rng.randrange(8, 40)] + made.prompt[1:]
        made.n = rng.choice([1, 1, 1, 2, 3])
        return made

    jobs = [mixed(i) for i in range(24)]
    with engine_with(slots=24, blocks=40, max_batch_tokens=rng.choice([7, 16, 64]), max_batch_seqs=12) as engine:

        def on_step(loop: EngineLoop) -> None:
            audit(loop)
            if loop.n_steps % 5 == 4 and len(loop.scheduler.running) > 1:
                loop.scheduler.preempt_youngest()
                loop.scheduler.check()

        engine._loop.on_step = on_step
        streams = [j.submit(engine) for j in jobs]
        for i, stream in enumerate(streams):
            if i % 6 == 5:
                next(stream)
                stream.close()
        for i, (j, stream) in enumerate(zip(jobs, streams, strict=True)):
            if i % 6 != 5:
                assert read(stream, j.n) == alone(j)
        assert engine.stats().preemptions > 0
        assert engine.stats().prefix_hits > 0


# --- the end of the engine --------------------------------------------------------------------------------------


def closed_engine() -> Engine:
    engine = Engine(TINY, EngineConfig(block_size=8, kv_memory=1 << 20, **OPTIONS), progress=False)
    engine.close()
    return engine


def test_submit_after_close() -> None:
    engine = closed_engine()
    with pytest.raises(EngineClosed):
        engine.submit(Request([[1]], SamplingParams()))
    with pytest.raises(EngineClosed):
        engine.generate([[1]])
    assert engine.slots.in_use == 0


def test_a_request_that_comes_in_behind_the_close() -> None:
    """The engine thread is busy with a step: `close` is in the inbox, and behind it another request."""
    engine = Engine(TINY, EngineConfig(block_size=8, kv_memory=1 << 20, **OPTIONS), progress=False)
    reached, go_on = threading.Event(), threading.Event()

    def on_step(loop: EngineLoop) -> None:
        reached.set()
        go_on.wait()

    engine._loop.on_step = on_step
    seat = engine.slots.acquire()
    first = engine.submit(Request([[1]], SamplingParams(max_tokens=50, ignore_eos=True)))
    reached.wait()
    closer = threading.Thread(target=engine.close)
    closer.start()
    deadline = time.monotonic() + 10
    while engine._inbox.empty():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    late = engine.submit(Request([[1]], SamplingParams(max_tokens=50)), seat=seat)
    go_on.set()
    closer.join()
    for stream in (first, late):
        with pytest.raises(EngineClosed):
            while stream.get(timeout=10) is not None:
                pass
    assert engine.slots.in_use == 0


LOST = {
    "torch": "CUDA error: an illegal memory access was encountered",
    "triton": "Triton Error [CUDA]: an illegal memory access was encountered",
}


@pytest.mark.parametrize("where", ["step", *LOST])
def test_an_error_of_the_engine_itself_reaches_every_stream(where: str) -> None:
    engine = Engine(TINY, EngineConfig(block_size=8, kv_memory=1 << 20, **OPTIONS), progress=False)

    all_are_there = threading.Event()

    def boom(loop: EngineLoop) -> None:
        all_are_there.wait()
        if where == "step" and loop.n_steps == 3:
            raise RuntimeError("broken scheduler")

    def lost(plan: Plan) -> None:
        if where in LOST and any(seq.n_generated == 3 for seq in plan.seqs):
            raise RuntimeError(LOST[where])

    engine._loop.on_step = boom
    engine._loop.runner = Faulty(engine._loop.runner, lost)
    streams = [engine.submit(Request([[1, i]], SamplingParams(max_tokens=50, ignore_eos=True))) for i in range(5)]
    all_are_there.set()
    for stream in streams:
        with pytest.raises(EngineDead, match="broken scheduler" if where == "step" else "illegal memory"):
            list(stream)
    engine._thread.join(10)
    assert not engine._thread.is_alive()
    with pytest.raises((EngineDead, EngineClosed)):
        engine.submit(Request([[1]], SamplingParams()))
    assert engine.slots.in_use == 0
    engine.close()


def test_an_engine_that_died_lets_go_of_its_weights() -> None:
    engine = Engine(TINY, EngineConfig(block_size=8, kv_memory=1 << 20, **OPTIONS), progress=False)
    model = weakref.ref(engine._loop.runner.model)  # type: ignore[attr-defined]

    def boom(loop: EngineLoop) -> None:
        raise RuntimeError("broken scheduler")

    engine._loop.on_step = boom
    with pytest.raises(EngineDead):
        list(engine.submit(Request([[1]], SamplingParams())))
    engine.close()
    gc.collect()
    assert model() is None


def test_an_interrupt_while_loading_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook: the loading thread must not wait for ever, with the weights, for nobody."""
    before = set(threading.enumerate())

    class Interrupted(SimpleQueue):
        def get(self, *args: object, **options: object) -> object:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return super().get(*args, **options)

    monkeypatch.setattr("llama.engine.SimpleQueue", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Engine(TINY, EngineConfig(block_size=8, kv_memory=1 << 20, **OPTIONS), progress=False)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_before_the_first_step_nobody_is_told_that_slots_are_free_at_once() -> None:
    with Engine(TINY, EngineConfig(block_size=8, kv_memory=1 << 20, **OPTIONS), progress=False) as engine:
        reached, go_on, launch = threading.Event(), threading.Event(), engine._loop.runner.launch

        def held(plan: Plan) -> Pending:
            reached.set()
            go_on.wait(10)
            return launch(plan)

        engine._loop.runner.launch = held  # type: ignore[method-assign]
        stream = engine.submit(Request([[1]], SamplingParams(max_tokens=3, ignore_eos=True)))
        reached.wait(10)
        assert engine.expected_wait() == 1.0
        go_on.set()
        assert sum(len(delta.token_ids) for delta in stream) == 3


def test_a_block_that_leaked_is_noticed() -> None:
    engine = Engine(TINY, EngineConfig(block_size=8, kv_memory=1 << 20, **OPTIONS), progress=False)
    leaked: list[int] = []

    def leak(loop: EngineLoop) -> None:
        if not leaked:
            leaked.append(loop.scheduler.pool.allocate())

    engine._loop.on_step = leak
    assert len(engine.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
    engine._thread.join(10)
    assert "1 blocks are held" in repr(engine._loop.error)
    with pytest.raises(EngineDead):
        engine.submit(Request([[1]], SamplingParams()))


def test_the_weights_go_with_the_engine() -> None:
    engine = Engine(TINY, EngineConfig(block_size=8, kv_memory=1 << 20, **OPTIONS), progress=False)
    assert isinstance(engine._loop.runner.cache.k[0], torch.Tensor)  # type: ignore[attr-defined]
    engine.close()
    assert not hasattr(engine._loop, "runner")
