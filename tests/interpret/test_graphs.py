"""Decode steps as graphs, without a GPU: what a captured graph does with its fixed buffers and padding rows."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue

import pytest
import torch

from llama.blocks import BlockPool
from llama.cache import KVCache
from llama.config import ModelConfig
from llama.graphs import SIZES, DecodeGraphs
from llama.loop import EngineLoop
from llama.model import Transformer, random_parameters
from llama.request import Request, SamplingParams
from llama.runner import Runner
from llama.scheduler import Scheduler
from llama.sequence import Sequence
from llama.stream import Mailbox

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of numpy, masked lanes

TINY = ModelConfig(64, 2, 4, 2, 16, 96, 131, max_seq_len=64)
CPU = torch.device("cpu")
STOP_IDS = frozenset([31])  # the sixth token of the first sequence


def tiny_model() -> tuple[Transformer, KVCache]:
    with torch.inference_mode():
        model = Transformer(TINY, random_parameters(TINY, torch.float32, CPU), TINY.max_seq_len, True)
        return model, KVCache.empty(TINY, 16, 16, torch.float32, CPU)


def run_steps(graphs: bool, ahead: bool = False) -> list[tuple[list[int], list[float]]]:
    """Tokens and logprobs of three sequences of different lengths that decode together and end one by one, the first
    on a stop id. One is sent back on the way, and so gets another block table."""
    model, cache = tiny_model()
    replays = []

    def capture(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """What a graph does: the same step again, on whatever its buffers hold by then."""

        def replay() -> torch.Tensor:
            replays.append(1)
            return step()

        return replay

    made = DecodeGraphs(model, cache, CPU, TINY.max_seq_len, 8, capture) if graphs else None
    loop = EngineLoop(Scheduler(BlockPool(16, 16), 64, 8), Runner(model, cache, CPU, made), SimpleQueue(), ahead)
    mailboxes = []
    for i, length in enumerate((3, 17, 9)):
        prompt = [1] + [(7 * i + 5 * j) % 120 + 3 for j in range(length - 1)]
        params = SamplingParams(temperature=0.0 if i else 0.8, logprobs=0)
        mailboxes.append(Mailbox(1, None, lambda _: None))
        seq = Sequence(Request([prompt], params), 0, prompt, length, length + 9 - i, i, STOP_IDS)
        loop.add(mailboxes[-1], [(seq, None)])
    sent_back = vain = 0
    while loop.scheduler.has_work:
        loop.step()
        vain += sum(seq.finish_reason is not None for step in loop.under_way for seq in step.plan.seqs)
        if loop.n_steps == 4 and not sent_back:
            sent_back += loop.scheduler.preempt_youngest() is not None
    assert sent_back
    assert bool(vain) == ahead, "a stop id is noticed a step late"
    assert bool(replays) == graphs
    deltas = [list(mailbox.deltas) for mailbox in mailboxes]
    return [
        (
            [token for delta in each for token in delta.token_ids],
            [lp.logprob for delta in each for lp in delta.logprobs],
        )
        for each in deltas
    ]


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_a_graph_with_padding_rows_gives_the_bits_of_the_eager_step(ahead: bool) -> None:
    """The batch shrinks from 3 to 1, under graphs of 4, 2 and 1 rows; the padding rows must not show."""
    assert run_steps(graphs=True, ahead=ahead) == run_steps(graphs=False)


def test_eager_steps_ahead_give_the_same_bits() -> None:
    assert run_steps(graphs=False, ahead=True) == run_steps(graphs=False)


@pytest.mark.parametrize("max_size", [1, 3, 8, 30, 100, 256, 1000])
def test_the_sizes_reach_what_was_asked_for(max_size: int) -> None:
    model, cache = tiny_model()
    sizes = DecodeGraphs(model, cache, CPU, TINY.max_seq_len, max_size, lambda step: step).sizes
    assert sizes[-1] == min(max_size, SIZES[-1])
    assert sizes == sorted(set(sizes))
