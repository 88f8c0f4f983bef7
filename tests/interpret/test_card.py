"""The engine on a card, without one: graphs, steps ahead, pinned memory, and what the host waits for."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from api_cases import write_model
from card import DEVICE, Card, Event, Operations

import llama.engine
from kernels import PinnedBuffer
from llama import Engine, EngineConfig, SamplingParams
from llama.batch import Batch, BlockTables, Step
from llama.blocks import BlockPool
from llama.cache import KVCache
from llama.config import ModelConfig
from llama.engine import Completion
from llama.graphs import DECODE_SIZES, Bucket, GraphExecutor, StepGraph, capture_cuda, sizes_up_to
from llama.loop import EngineLoop
from llama.model import Transformer, random_parameters
from llama.request import Request
from llama.runner import Runner
from llama.scheduler import Plan, Scheduler
from llama.sequence import Sequence
from llama.setup import Setup, build_runner
from llama.stream import Mailbox

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of numpy, masked lanes

TINY = ModelConfig(64, 2, 4, 2, 16, 96, 131, max_seq_len=160)
CPU = torch.device("cpu")
STOP_IDS = frozenset([31])  # the sixth token of the first sequence

Answers = list[tuple[list[int], list[float]]]


def tiny_model(device: torch.device) -> tuple[Transformer, KVCache]:
    weights = {name: tensor.to(device) for name, tensor in random_parameters(TINY, torch.float32, CPU).items()}
    return Transformer(TINY, weights, TINY.max_seq_len, True), KVCache.empty(TINY, 32, 16, torch.float32, device)


def three_sequences(graphs: bool, ahead: bool, card: Card | None, watch: Callable[[EngineLoop], None]) -> Answers:
    """Tokens and logprobs of three sequences of different lengths that decode together, into new blocks, and end one by
    one, the first on a stop id. One is sent back on the way, and so gets another block table. watch: called before
    every step."""
    device = DEVICE if card else CPU
    with torch.inference_mode(), card or contextlib.nullcontext():
        model, cache = tiny_model(device)
        make = partial(StepGraph, model, cache)
        executors = [GraphExecutor(partial(make, capture_cuda()), 8, 32)] if graphs else []
        runner = Runner(model, cache, executors)
        loop = EngineLoop(Scheduler(BlockPool(16, 16), 64, 8), runner, SimpleQueue(), ahead)
        mailboxes = []
        for i, length in enumerate((3, 17, 9)):
            prompt = [1] + [(7 * i + 5 * j) % 120 + 3 for j in range(length - 1)]
            params = SamplingParams(temperature=0.0 if i else 0.8, logprobs=0)
            mailboxes.append(Mailbox(1, None, lambda _: None))
            seq = Sequence(Request([prompt], params), 0, prompt, length, length + 12 - i, i, STOP_IDS)
            loop.add(mailboxes[-1], [(seq, None)])
        sent_back = vain = 0
        while loop.scheduler.has_work:
            watch(loop)
            loop.step()
            vain += sum(seq.finish_reason is not None for step in loop.under_way for seq in step.plan.seqs)
            if loop.n_steps == 4 and not sent_back:
                sent_back += loop.scheduler.preempt_youngest() is not None
    assert sent_back
    assert bool(vain) == ahead, "a stop id is noticed a step late"
    deltas = [list(mailbox.deltas) for mailbox in mailboxes]
    return [
        (
            [token for delta in each for token in delta.token_ids],
            [lp.logprob for delta in each for lp in delta.logprobs],
        )
        for each in deltas
    ]


def nothing(_: EngineLoop) -> None:
    pass


@pytest.fixture(scope="module")
def in_turn() -> Answers:
    """What the same kernels compute without a card, one after the other."""
    return three_sequences(graphs=False, ahead=False, card=None, watch=nothing)


@pytest.mark.parametrize("pace", [None, 1], ids=["late", "any time"])
@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_the_bits_do_not_depend_on_when_the_card_gets_to_it(
    graphs: bool, ahead: bool, pace: int | None, in_turn: Answers
) -> None:
    """The batch shrinks from 3 to 1, under graphs of 4, 2 and 1 rows; the padding rows must not show."""
    card = Card(None if pace is None else random.Random(pace))
    assert three_sequences(graphs, ahead, card, nothing) == in_turn
    assert bool(card.n_replays) == graphs


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_what_a_decode_step_costs(ahead: bool) -> None:
    """By a graph: one copy to the card for the step and one of the random numbers' places, the tokens and the four
    arrays of their logprobs back, the sampling beside the graph. The host waits for events only."""
    card = Card()
    costs: list[tuple[int, ...]] = []

    def note(loop: EngineLoop) -> None:
        costs.append((card.uploads, card.fetches, card.launches, card.n_replays, len(card.graphs), card.stalls))

    three_sequences(True, ahead, card, note)
    steps = [tuple(b - a for a, b in zip(one, two, strict=True)) for one, two in pairwise(costs)]
    assert steps[2] == (2, 5, 3, 1, 0, 0)
    assert {step[3] for step in steps[:-1]} == {1}, "prompts, decodes, and both together are one graph each"
    assert sum(step[4] for step in steps) >= 2
    for step in steps:
        assert step[5] == 2 * step[4], "only captures may wait for all of it"


def test_without_waiting_for_its_buffer_a_graph_reads_the_next_step(
    monkeypatch: pytest.MonkeyPatch, in_turn: Answers
) -> None:
    monkeypatch.setattr(PinnedBuffer, "wait", lambda self: None)
    assert three_sequences(graphs=True, ahead=True, card=Card(), watch=nothing) != in_turn


def test_without_waiting_for_a_step_its_tokens_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    with pytest.raises(OverflowError):  # the poison is no token
        three_sequences(graphs=False, ahead=False, card=Card(), watch=nothing)


def test_what_the_card_refuses() -> None:
    with Card() as card:
        there, here = torch.zeros(2, device=DEVICE), torch.zeros(2)
        with pytest.raises(RuntimeError, match="all tensors must be on the card"):
            there + here
        for wait in (there.cpu, there.sum().item, lambda: there.copy_(here, non_blocking=True)):
            stalls = card.stalls
            wait()
            assert card.stalls > stalls
            with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="while a graph"):
                wait()


@pytest.mark.parametrize("most", [1, 3, 8, 30, 100, 256, 1000])
def test_the_sizes_reach_what_was_asked_for(most: int) -> None:
    sizes = sizes_up_to(most, DECODE_SIZES)
    assert sizes[-1] == min(most, DECODE_SIZES[-1])
    assert sizes == sorted(set(sizes))


def some_step(pieces: list[tuple[int, int]]) -> Step:
    """(first position, tokens) of each sequence, which has those tokens and no more, in blocks from 1 on."""
    plan, block = Plan(), 1
    for i, (first, n) in enumerate(pieces):
        ids = [1] + [(11 * i + 3 * j) % 120 + 3 for j in range(first + n - 1)]
        seq = Sequence(Request([ids], SamplingParams()), i, ids, len(ids), len(ids) + 9, i, STOP_IDS)
        n_blocks = -(-len(ids) // 16)
        seq.block_table = list(range(block, block + n_blocks))
        block += n_blocks
        plan.add(seq, first, n, True)
    return Step.of(plan, BlockTables(), 16, None)


@pytest.mark.parametrize(
    "pieces",
    [[(0, 5)], [(120, 16)], [(130, 1), (0, 9), (125, 6)], [(7, 1), (31, 1), (127, 2)], [(0, 4), (9, 1)]],
    ids=str,
)
def test_a_graph_of_prompts_gives_the_bits_of_the_eager_step(pieces: list[tuple[int, int]]) -> None:
    """Pieces across tiles of attention, single tokens beside them, and what an earlier step has left in the inputs."""
    with torch.inference_mode():
        model, cache = tiny_model(CPU)
        graphs = GraphExecutor(partial(StepGraph, model, cache, lambda step: step), 4, 16)
        for step in (some_step([(0, 2), (5, 1), (6, 1), (8, 1)]), some_step(pieces)):
            before = cache.whole.normal_().clone()
            assert graphs.serves(step)
            logits = graphs.run(step, None)
            after = cache.whole.clone()
            cache.whole.copy_(before)
            eager = model.logits(model.forward(Batch.of(step, step.logit_rows, CPU, None), cache))
            assert torch.equal(cache.whole, after)
            assert torch.equal(logits, eager)


def test_what_a_graph_of_prompts_does_not_serve() -> None:
    graphs = GraphExecutor(lambda bucket: StepGraph.__new__(StepGraph), 40, 2048)
    assert graphs.prompt_buckets[-1] == Bucket(256, 32, 16)
    assert graphs.serves(some_step([(0, 256)])) and not graphs.serves(some_step([(0, 257)]))
    assert graphs.serves(some_step([(9, 1)] * 40)) and not graphs.serves(some_step([(9, 1)] * 41))
    assert graphs.serves(some_step([(0, 2)] + [(9, 1)] * 31)) and not graphs.serves(some_step([(0, 2)] + [(9, 1)] * 32))
    assert graphs.serves(some_step([(0, 2)] * 16)) and not graphs.serves(some_step([(0, 2)] * 17))
    assert graphs.serves(some_step([(127, 2)] * 8)) and not graphs.serves(some_step([(127, 2)] * 9))


def no_graph(*_: object) -> StepGraph:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_without_memory_for_graphs_steps_run_kernel_by_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, in_turn: Answers
) -> None:
    monkeypatch.setattr(StepGraph, "__init__", no_graph)
    card = Card()
    assert three_sequences(graphs=True, ahead=True, card=card, watch=nothing) == in_turn
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) > 1, "each graph is tried once"
    assert all("no memory for a graph of" in line for line in said)


REQUESTS = [
    SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, prompt_logprobs=2),
    SamplingParams(max_tokens=9, temperature=0.9, seed=5, top_p=0.9, logprobs=3, frequency_penalty=0.5),
    SamplingParams(max_tokens=5, temperature=1.3, seed=6, top_k=20, min_p=0.02, logit_bias={17: 4.0}, min_tokens=3),
    SamplingParams(max_tokens=7, temperature=0, repetition_penalty=1.3, logprobs=0),
]


def engine_answers(model: Path, config: EngineConfig) -> list[Completion]:
    """To all of REQUESTS at once, with prompts that are cut into chunks."""
    with Engine(model, config, progress=False) as engine:
        prompts = [[1, *(3 + 7 * (i + j) % 300 for j in range(4 + 9 * i))] for i in range(len(REQUESTS))]
        return engine.generate(prompts, REQUESTS)


def test_a_whole_engine(tmp_path: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the files to the tokens: weights by pinned memory, graphs made ahead, penalties, the engine's own thread."""
    model = write_model(tmp_path, tiny_tokenizer_file, context=96, dim=64)
    options = EngineConfig(slots=4, kv_memory=1 << 20, block_size=16, max_batch_tokens=16, dtype="float32")
    plain = engine_answers(model, replace(options, device="cpu", batch_invariant=True))
    card = Card()

    def build(setup: Setup, progress: bool) -> Runner:
        Operations(card).__enter__()  # of this thread, and as long as it lives
        return build_runner(setup, progress)

    monkeypatch.setattr(llama.engine, "build_runner", build)
    with card:
        assert engine_answers(model, replace(options, device="cuda")) == plain
    assert len(card.graphs) >= 3 and card.n_replays
