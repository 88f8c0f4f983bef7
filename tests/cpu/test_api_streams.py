"""Streamed or whole, fast or slow reader: the same answer, field by field, whatever the tokens and the stop strings."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from api_cases import MESSAGES, PROMPT, Script, write_model

import api
from api.answer import Answer, ChatAnswer, CompletionAnswer, Heading, merge
from api.checks import Endpoint
from api.prompt import from_text
from api.request import read
from llama.blocks import BlockPool
from llama.config import Limits
from llama.detokenizer import Detokenizer
from llama.loop import EngineLoop
from llama.request import Request
from llama.scheduler import Scheduler
from llama.sequence import FinishReason
from llama.sequence import Sequence as TokenSequence
from llama.stream import Delta, Mailbox
from llama.tokenizer import Tokenizer

N_SEQUENCES = 10_000
BATCH = 50


class Bench:
    """An engine's loop in this thread, without a model: sequences say what they are told, and deltas come out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.scripts: list[list[int]] = []
        runner = Script(lambda index, prompt: self.scripts[index])
        pool = BlockPool(4096, 16, prefix_cache=False)
        self.loop = EngineLoop(Scheduler(pool, 4096, 256), runner, SimpleQueue())

    def run(self, requests: Sequence[tuple[Request, list[int]]]) -> list[tuple[Mailbox, list[Delta]]]:
        """Each request has one sequence, which says its script and then EOS."""
        self.scripts = [script for _, script in requests]
        made = []
        vocabulary = self.tokenizer.vocabulary
        for i, (request, _) in enumerate(requests):
            prompt, params = list(request.prompts[0]), request.params
            assert params.max_tokens is not None
            mailbox = Mailbox(1, None, lambda mailbox: None)
            seq = TokenSequence(
                request,
                i,
                prompt,
                len(prompt),
                len(prompt) + params.max_tokens,
                0,
                frozenset({2, *params.stop_token_ids}),
            )
            skip = request.chat or vocabulary.is_blank(prompt)
            self.loop.add(mailbox, [(seq, Detokenizer(vocabulary, skip_first_mark=skip, stop=tuple(params.stop)))])
            made.append(mailbox)
        while self.loop.scheduler.has_work:
            self.loop.step()
        return [(mailbox, list(mailbox.deltas)) for mailbox in made]


def random_ids(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Pieces, whole characters in bytes, stray bytes, control tokens, bare marks."""
    byte_ids = {value[0]: i for i, value in tokenizer.vocabulary.byte_values.items()}
    ids: list[int] = []
    for _ in range(rng.randrange(1, 9)):
        kind = rng.random()
        if kind < 0.6:
            ids.append(rng.randrange(3, tokenizer.vocab_size))
        elif kind < 0.8:
            ids += [byte_ids[b] for b in chr(rng.choice((0xE9, 0x4F60, 0x1F600, 0xFFFD))).encode()]
        elif kind < 0.9:
            ids.append(byte_ids[rng.choice((0x41, 0x80, 0xE4, 0xBD, 0xF0, 0xFF))])
        else:
            ids.append(rng.choice((0, 1, tokenizer.vocabulary.names.index(" "))))
    return ids


def random_fields(rng: random.Random, tokenizer: Tokenizer, endpoint: Endpoint, ids: list[int]) -> dict[str, Any]:
    text = tokenizer.decode(ids)
    stops = []
    for _ in range(rng.randrange(4)):
        start = rng.randrange(len(text) + 1)
        stops.append(text[start : start + rng.randrange(1, 6)] or "x")
    fields: dict[str, Any] = {"stop": stops, "max_tokens": rng.choice((1, 3, 100)), "min_tokens": rng.choice((0, 0, 1))}
    if rng.random() < 0.3:
        fields["stop_token_ids"] = [rng.choice(ids)]
    if rng.random() < 0.5:
        fields |= {"logprobs": True, "top_logprobs": 2} if endpoint == "chat" else {"logprobs": rng.choice((0, 2))}
    if rng.random() < 0.3:
        fields["return_token_ids"] = True
    if endpoint == "completions" and rng.random() < 0.3:
        fields["echo"] = True
    return fields


def answer_maker(
    tokenizer: Tokenizer, endpoint: Endpoint, fields: dict[str, Any]
) -> tuple[Request, Callable[..., Any]]:
    base = {"messages": MESSAGES} if endpoint == "chat" else {"prompt": PROMPT}
    arguments = read(endpoint, {**base, **fields}, vocab_size=tokenizer.vocab_size, limits=Limits())
    prompt = from_text(PROMPT, tokenizer, 1000, add_bos=True, parse_special=True, double_bos=False)
    request = Request([prompt.ids], arguments.params, chat=endpoint == "chat")
    kind = ChatAnswer if endpoint == "chat" else CompletionAnswer
    heading = Heading("tiny", 0, "fp_0", request_id="x")

    def make(mailbox: Mailbox, stream: bool = True) -> Answer[Any, Any]:
        arguments.stream = stream
        return kind(arguments, heading, [prompt], tokenizer.vocabulary, mailbox.stats)

    return request, make


def copies(deltas: list[Delta], index: int = 0) -> list[Delta]:
    return [
        Delta(index, list(d.token_ids), d.text, list(d.logprobs), list(d.offsets), d.finish_reason, d.prompt_logprobs)
        for d in deltas
    ]


def joined(endpoint: Endpoint, chunks: list[Any]) -> dict[str, Any]:
    """The chunks of a stream of one choice, put together by a plain reader of the wire form."""
    text, reasons, ids, logprobs = "", [], [], None
    for chunk in (chunk.to_dict() for chunk in chunks):
        (choice,) = chunk["choices"]
        text += choice["delta"].get("content", "") if endpoint == "chat" else choice["text"]
        reasons.append(choice["finish_reason"])
        ids += choice.get("token_ids", [])
        if choice["logprobs"] is not None:
            logprobs = choice["logprobs"] if logprobs is None else _append(logprobs, choice["logprobs"])
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return {"text": text, "finish_reason": reasons[-1], "token_ids": ids, "logprobs": logprobs}


def _append(logprobs: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v is None else v + more[k] for k, v in logprobs.items()}


def told(endpoint: Endpoint, whole: Any) -> dict[str, Any]:
    (choice,) = whole.to_dict()["choices"]
    text = choice["message"]["content"] if endpoint == "chat" else choice["text"]
    return {
        "text": text,
        "finish_reason": choice["finish_reason"],
        "token_ids": choice.get("token_ids", []),
        "logprobs": choice["logprobs"],
    }


@pytest.mark.slow
def test_stream_equals_whole_for_10000_random_answers(tiny_tokenizer: Tokenizer) -> None:
    rng = random.Random(4)
    bench = Bench(tiny_tokenizer)
    stopped = 0
    for _ in range(N_SEQUENCES // BATCH):
        made = []
        for _ in range(BATCH):
            endpoint: Endpoint = rng.choice(("chat", "completions"))
            ids = random_ids(rng, tiny_tokenizer)
            fields = random_fields(rng, tiny_tokenizer, endpoint, ids)
            made.append((endpoint, ids, fields, *answer_maker(tiny_tokenizer, endpoint, fields)))
        deltas = bench.run([(request, ids) for _, ids, _, request, _ in made])
        for (endpoint, ids, fields, _, make), (mailbox, ones) in zip(made, deltas, strict=True):
            whole_answer, stream_answer = make(mailbox, stream=False), make(mailbox)
            whole = whole_answer.whole(c for d in merge(copies(ones)) for c in whole_answer.chunks(d))
            chunks = []
            rest = copies(ones)
            while rest:
                gathered = rng.choice((1, 1, 2, len(rest)))  # a reader of changing speed
                chunks += [c for d in merge(rest[:gathered]) for c in stream_answer.chunks(d)]
                rest = rest[gathered:]
            expected = told(endpoint, whole)
            assert joined(endpoint, chunks) == expected, (ids, fields)
            assert stream_answer.usage == whole_answer.usage == whole.usage
            if expected["logprobs"] is not None:
                check_logprobs(endpoint, expected, whole, fields)
            stopped += expected["finish_reason"] == "stop" and ids[: whole.usage.completion_tokens] != ids
    assert stopped > N_SEQUENCES / 10, "many ended early, so stop strings were met"


def check_logprobs(endpoint: Endpoint, expected: dict[str, Any], whole: Any, fields: dict[str, Any]) -> None:
    """One entry per token that is counted, and offsets inside the text."""
    count = whole.usage.total_tokens if fields.get("echo") else whole.usage.completion_tokens
    if endpoint == "chat":
        assert len(expected["logprobs"]["content"]) == count
        return
    lists = expected["logprobs"]
    assert {len(one) for one in lists.values() if one is not None} == {count}
    offsets = lists["text_offset"]
    assert offsets == sorted(offsets)
    assert 0 <= offsets[0] <= offsets[-1] <= len(expected["text"])


# --- on a running engine -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Iterator[api.Client]:
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer_file)
    with api.Client(folder, block_size=16) as client:
        yield client


@pytest.mark.parametrize("seed", range(4))
def test_stream_equals_whole_on_an_engine(client: api.Client, seed: int) -> None:
    fields = {"seed": seed, "temperature": 1.2, "max_tokens": 40, "n": 3, "stop": ["ab", " the ", "e"], "min_tokens": 3}
    creators: list[tuple[Endpoint, Any]] = [
        ("chat", lambda **more: client.chat.completions.create(messages=MESSAGES, logprobs=True, **fields, **more)),
        (
            "completions",
            lambda **more: client.completions.create(prompt=PROMPT, logprobs=1, echo=True, **fields, **more),
        ),
    ]
    for endpoint, create in creators:
        whole = create()
        stream = create(stream=True)
        chunks = list(stream)
        for j in range(3):
            mine = [chunk for chunk in chunks if chunk.choices[0].index == j]
            one = whole.model_copy(update={"choices": [whole.choices[j]]})
            assert joined(endpoint, mine) == told(endpoint, one)
        details = {"prompt_tokens_details"}  # the second call finds the first one's blocks
        assert stream.usage.model_dump(exclude=details) == whole.usage.model_dump(exclude=details)


def test_text_is_released_as_soon_as_it_is_certain(tiny_tokenizer: Tokenizer) -> None:
    """A held stop string comes out the moment it can no longer match; a character when its last byte is there."""
    bench = Bench(tiny_tokenizer)
    ids = [i for c in "a€b xyzq" for i in piece(tiny_tokenizer, c)]
    request, make = answer_maker(tiny_tokenizer, "chat", {"stop": ["xyz!"], "max_tokens": 100})
    ((mailbox, deltas),) = bench.run([(request, ids)])
    answer = make(mailbox)
    shown = [c.choices[0].delta.content for d in deltas for c in answer.chunks(d) if c.choices[0].delta.content]
    assert shown == ["a", "€", "b", " ", "xyzq"]


def piece(tokenizer: Tokenizer, character: str) -> list[int]:
    names = tokenizer.vocabulary.names
    if character in names:
        return [names.index(character)]
    return [names.index(f"bytes:\\x{byte:02x}") for byte in character.encode()]


def test_finish_reasons(tiny_tokenizer: Tokenizer) -> None:
    """A stop that completes on the last allowed token is a stop."""
    bench = Bench(tiny_tokenizer)
    a, b = piece(tiny_tokenizer, "a"), piece(tiny_tokenizer, "b")
    for fields, reason, text in (
        ({"max_tokens": 2, "stop": ["ab"]}, "stop", ""),
        ({"max_tokens": 2}, "length", "ab"),
        ({"max_tokens": 3}, "stop", "ab"),
        ({"max_tokens": 2, "stop_token_ids": b}, "stop", "a"),
        ({"max_tokens": 2, "stop": ["abc"]}, "length", "ab"),
    ):
        request, make = answer_maker(tiny_tokenizer, "chat", fields)
        ((mailbox, deltas),) = bench.run([(request, a + b)])
        answer = make(mailbox, stream=False)
        choice = answer.whole(c for d in deltas for c in answer.chunks(d)).choices[0]
        assert (choice.finish_reason, choice.message.content) == (reason, text), fields
    assert {reason.value for reason in FinishReason} == {"stop", "length", "abort", "error"}, "only two are ever sent"
