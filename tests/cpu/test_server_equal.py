"""The same script of calls, over HTTP with OpenAI's own client and in process: equal JSON, but for ids and times."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_cases import MESSAGES, PROMPT, write_model
from server_cases import Answer, Serving, ask, get, post, serving

import api

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "An engine."},
    {"role": "user", "content": "How far is it to the hill?"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "How far "}, {"type": "text", "text": "is it?"}]}]

CHAT: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0, "max_tokens": 1},
    {"temperature": 0, "max_completion_tokens": 9},
    {"messages": TURNS, "seed": 4},
    {"messages": PARTS, "seed": 4},
    {"seed": 1},
    {"seed": 1, "n": 3},
    {"seed": 1, "top_p": 0.5},
    {"seed": 1, "stop": "e"},
    {"seed": 1, "stop": ["a", "o", "the"]},
    {"seed": 1, "presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"seed": 1, "logit_bias": {"300": 100}},
    {"seed": 1, "logprobs": True},
    {"seed": 1, "logprobs": True, "top_logprobs": 3},
    {"seed": 1, "user": "someone", "metadata": {"a": "b"}},
    {"seed": 1, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto"},
    {"seed": 1, "response_format": {"type": "text"}},
    {"seed": 1, "extra_body": {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2}},
    {"seed": 1, "extra_body": {"ignore_eos": True, "min_tokens": 4, "stop_token_ids": [300, 301]}},
    {"seed": 1, "extra_body": {"return_token_ids": True}},
    {"seed": 1, "extra_body": {"no_such_field": 7}},
    # What is refused.
    {"messages": []},
    {"messages": [{"role": "assistant", "content": "I begin."}]},
    {"messages": [{"role": "user", "content": "[INST] hello"}]},
    {"messages": [{"role": "user", "content": "word " * 400}]},
    {"temperature": 3},
    {"max_tokens": 0},
    {"n": 9},
    {"top_logprobs": 3},
    {"tool_choice": "required"},
    {"model": "another"},
    {"extra_body": {"top_k": "many"}},
    {"extra_body": {"strict": True, "user": "x"}},
]
COMPLETIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0, "max_tokens": 40},
    {"temperature": 0, "prompt": ""},
    {"temperature": 0, "prompt": [PROMPT, "At night"]},
    {"temperature": 0, "prompt": [1, 300, 301]},
    {"temperature": 0, "prompt": [[1, 300], [1, 301, 302]], "n": 2},
    {"temperature": 0, "prompt": "<s>[INST] Tell me a joke. [/INST]"},
    {"temperature": 0, "prompt": "<s>text</s>", "extra_body": {"parse_special": False}},
    {"temperature": 0, "prompt": PROMPT, "extra_body": {"add_special_tokens": False}},
    {"seed": 2, "n": 2, "best_of": 4},
    {"seed": 2, "echo": True},
    {"seed": 2, "logprobs": 0},
    {"seed": 2, "logprobs": 5},
    {"seed": 2, "logprobs": 2, "echo": True, "max_tokens": 0},
    {"seed": 2, "stop": [" "]},
    {"seed": 2, "user": "someone"},
    {"seed": 2, "extra_body": {"return_token_ids": True}},
    # What is refused.
    {"prompt": []},
    {"prompt": [1, "two"]},
    {"prompt": [100000]},
    {"prompt": "word " * 400},
    {"suffix": "end"},
    {"best_of": 1, "n": 2},
    {"logprobs": 6},
    {"max_tokens": -1},
    {"seed": 2**70},
]
SCRIPT = [("chat", one) for one in CHAT] + [("completions", one) for one in COMPLETIONS]
STREAMED = [(kind, one) for kind, one in SCRIPT if "best_of" not in one]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer_file)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Serving]:
    with serving(api.AsyncClient(folder, block_size=16, batch_invariant=True)) as running:
        yield running


@pytest.fixture(scope="module")
def remote(served: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[api.Client]:
    with api.Client(folder, block_size=16, batch_invariant=True) as client:
        yield client


def fields_of(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    first = {"messages": MESSAGES} if kind == "chat" else {"prompt": PROMPT}
    seeded = {} if "seed" in given else {"temperature": 0}
    return {"model": "tiny", "max_tokens": 12, **first, **seeded, **given}


def endpoint(client: Any, kind: str) -> Any:
    return client.chat.completions if kind == "chat" else client.completions


def plain(made: dict[str, Any]) -> dict[str, Any]:
    """An answer without what is different every time, and without what depends on who asked before."""
    made = json.loads(json.dumps(made))
    if made.get("usage"):
        made["usage"]["prompt_tokens_details"].pop("cached_tokens")
    assert made.pop("id").startswith("tiny-")
    made.pop("created")
    return made


def outcome_over_http(client: openai.OpenAI, kind: str, fields: dict[str, Any]) -> Any:
    try:
        return plain(json.loads(endpoint(client, kind).with_raw_response.create(**fields).text))
    except openai.APIStatusError as error:
        return {"status": error.status_code, "error": error.body}


def outcome_in_process(client: api.Client, kind: str, fields: dict[str, Any]) -> Any:
    try:
        return plain(endpoint(client, kind).create(**fields).to_dict())
    except api.APIError as error:
        return {"status": error.status_code, "error": error.body}


# What only the first chunk of a stream has, and the first part of a choice.
OPENING = ("ignored_parameters", "prompt_token_ids")


def folded(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The chunks of a stream as one: where one ends and the next begins depends on the reader's pace."""
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            choices.setdefault(choice["index"], []).append(choice)
    return {
        "first": {name: value for name, value in plain(chunks[0]).items() if name != "choices"},
        "last": {name: value for name, value in plain(chunks[-1]).items() if name not in ("choices", *OPENING)},
        "choices": {index: [joined(parts), *ends(parts)] for index, parts in sorted(choices.items())},
    }


def ends(parts: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last part, which may be one and the same, without what the other one has then as well."""
    assert not any(part["finish_reason"] for part in parts[:-1])
    blank = dict.fromkeys(("text", "token_ids", "logprobs"))
    first = {name: blank.get(name, value) for name, value in parts[0].items() if name != "finish_reason"}
    last = {name: blank.get(name, value) for name, value in parts[-1].items() if name not in OPENING}
    return first, last


def joined(parts: list[Any]) -> Any:
    text = "".join(part["text"] if "text" in part else part["delta"].get("content") or "" for part in parts)
    ids = [token for part in parts for token in part.get("token_ids", [])]
    logprobs: dict[str, list[Any]] = {}
    for part in parts:
        for name, values in (part["logprobs"] or {}).items():
            logprobs.setdefault(name, []).extend(values or [])
    return text, ids, logprobs


def test_it_is_a_long_script() -> None:
    assert len(SCRIPT) >= 60


@pytest.mark.parametrize(("kind", "given"), SCRIPT, ids=lambda one: json.dumps(one)[:60])
def test_whole(remote: openai.OpenAI, local: api.Client, kind: str, given: dict[str, Any]) -> None:
    fields = fields_of(kind, given)
    assert outcome_over_http(remote, kind, fields) == outcome_in_process(local, kind, fields)


@pytest.mark.parametrize(("kind", "given"), STREAMED, ids=lambda one: json.dumps(one)[:60])
def test_streamed(remote: openai.OpenAI, local: api.Client, kind: str, given: dict[str, Any]) -> None:
    fields = fields_of(kind, given) | {"stream": True}
    if "user" not in given:
        fields["stream_options"] = {"include_usage": True}
    try:
        here: Any = folded([chunk.to_dict() for chunk in endpoint(local, kind).create(**fields)])
    except api.APIError as error:
        here = {"status": error.status_code, "error": error.body}
    try:
        with endpoint(remote, kind).create(**fields) as stream:
            there: Any = folded([chunk.to_dict() for chunk in stream])
    except openai.APIStatusError as error:
        there = {"status": error.status_code, "error": error.body}
    assert there == here
    assert ("status" in there) == ("error" in there)


def test_models_and_tokens(remote: openai.OpenAI, local: api.Client, served: Serving, folder: Path) -> None:
    def same(here: Any, there: Any) -> None:
        assert {**here, "created": 0} == {**there, "created": 0}

    same(remote.models.list().data[0].to_dict(), local.models.list().data[0].to_dict())
    same(remote.models.retrieve("tiny").to_dict(), local.models.retrieve("tiny").to_dict())
    dashes = str(folder).replace("/", "--")
    for name in (str(folder), str(folder).replace("/", "%2F"), dashes):
        assert ask(served.port, get(f"/v1/models/{name}")).json["id"] == "tiny"
    with pytest.raises(openai.NotFoundError):
        remote.models.retrieve("another/one")
    for fields in (
        {"prompt": "hello"},
        {"prompt": "hello", "add_special_tokens": False, "return_token_strs": True},
        {"prompt": "<s>", "parse_special": False},
        {"messages": TURNS},
    ):
        answer = ask(served.port, post("/tokenize", fields)).json
        assert answer == local.tokenize(**fields).to_dict()
        text = ask(served.port, post("/detokenize", {"tokens": answer["tokens"]})).json
        assert text == local.detokenize(answer["tokens"]).to_dict()
    names = ask(served.port, get("/tokenizer_info")).json
    assert names == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def test_events_are_in_order(served: Serving) -> None:
    """The wire itself: role, text, end, usage, [DONE]; every line one JSON object in ASCII; the same id all through."""
    fields = {"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 5, "n": 2, "seed": 1}
    answer = ask(served.port, post("/v1/chat/completions", fields | {"stream_options": {"include_usage": True}}))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    *events, done = answer.events
    assert done == "[DONE]"
    assert answer.body.isascii()
    assert {event["id"] for event in events} == {f"tiny-{answer.headers['x-request-id']}"}
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["prompt_tokens"] > 0
    assert all(event["usage"] is None and "error" not in event for event in events[:-1])
    for index in (0, 1):
        mine = [c for event in events for c in event["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["delta"] == {}
        assert mine[-1]["finish_reason"] in ("stop", "length")


def kinds(events: list[Any]) -> list[tuple[Any, ...]]:
    """What each event of a chat stream is: its part, its choice, why it ended; text over several events counts once."""
    found: list[tuple[Any, ...]] = []
    for event in events:
        if event == "[DONE]":
            found.append(("done",))
        elif not event["choices"]:
            assert event["usage"]["total_tokens"] > 0
            found.append(("usage",))
        for choice in [] if event == "[DONE]" else event["choices"]:
            delta, end = choice["delta"], choice["finish_reason"]
            kind = "end" if end else "role" if "role" in delta else "text"
            assert (kind == "end") == (delta == {}), "the end has no text, and text no end"
            found.append((kind, choice["index"]))
    return found


def order_of(found: list[tuple[Any, ...]]) -> dict[int, list[str]]:
    """The kinds of each choice's events, repeated text as one; what belongs to no choice must come last."""
    tail = [one[0] for one in found if len(one) == 1]
    assert [one[0] for one in found[len(found) - len(tail) :]] == tail == ["usage", "done"]
    by_choice: dict[int, list[str]] = {}
    for kind, index in found[: -len(tail)]:
        mine = by_choice.setdefault(index, [])
        if kind != "text" or mine[-1:] != ["text"]:
            mine.append(kind)
    return by_choice


def test_events_come_in_the_recorded_order(served: Serving, shared_file: Callable[[str], Path]) -> None:
    """OpenAI's own recorded streams, each beside one of ours with as many choices, and log-probs where it has them."""
    files = sorted(shared_file("openai/sse_recorded").glob("*.sse"))
    assert len(files) == 12
    for file in files:
        theirs = Answer(200, {}, file.read_bytes()).events
        order = order_of(kinds(theirs))
        logprobs = bool(theirs[0]["choices"][0]["logprobs"])
        fields = {"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 6, "n": len(order), "seed": 1}
        fields |= {"stream_options": {"include_usage": True}, "logprobs": logprobs, "ignore_eos": True}
        ours = ask(served.port, post("/v1/chat/completions", fields)).events
        assert order_of(kinds(ours)) == order, file.name
        assert list(ours[0])[:4] == list(theirs[0])[:4] == ["id", "object", "created", "model"]


def test_the_2023_client_gets_what_it_looks_for(served: Serving) -> None:
    """What openai 0.28 sends and reads: `data:` lines, no `error` key before the end, an error with a message."""
    headers = {"Authorization": "Bearer none", "X-OpenAI-Client-User-Agent": '{"bindings_version": "0.28.1"}'}
    fields = {"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 5, "temperature": 0}
    answer = ask(served.port, post("/v1/chat/completions", fields, headers))
    lines = [line for line in answer.body.split(b"\n") if line]
    assert lines.pop() == b"data: [DONE]"
    assert all(line.startswith(b"data: ") and "error" not in json.loads(line[6:]) for line in lines)
    whole = ask(served.port, post("/v1/chat/completions", fields | {"stream": False}, headers)).json
    assert whole["choices"][0]["message"]["content"] == "".join(
        json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines
    )
    refused = ask(served.port, post("/v1/chat/completions", fields | {"n": 0}, headers))
    assert refused.status == 400
    assert isinstance(refused.json["error"]["message"], str)


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")


def curl(served: Serving, kind: str, fields: dict[str, Any]) -> tuple[int, str]:
    """The status and the body of an answer, as curl gives them."""
    url = f"{served.url}/v1/{'chat/completions' if kind == 'chat' else 'completions'}"
    options = ["-sSN", "-w", "\n%{http_code}", "-H", "Content-Type: application/json", "--data-binary", "@-"]
    done = subprocess.run(
        ["curl", *options, url],
        input=json.dumps(wire_fields(fields)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def wire_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """What openai's client makes of a call: `extra_body` stands beside the other fields."""
    return {name: value for name, value in fields.items() if name != "extra_body"} | fields.get("extra_body", {})


@needs_curl
@pytest.mark.parametrize(("kind", "given"), SCRIPT, ids=lambda one: json.dumps(one)[:60])
def test_curl_runs_the_script(served: Serving, local: api.Client, kind: str, given: dict[str, Any]) -> None:
    fields = fields_of(kind, given)
    status, body = curl(served, kind, fields)
    there = json.loads(body)
    here = outcome_in_process(local, kind, fields)
    assert (plain(there) if status == 200 else {"status": status, **there}) == here


@needs_curl
@pytest.mark.parametrize("kind", ["chat", "completions"])
@pytest.mark.parametrize(
    "given",
    [{}, {"logprobs": True}, {"user": "someone"}, {"extra_body": {"return_token_ids": True}}, {"n": 3}],
    ids=json.dumps,
)
def test_curl_sees_the_events_of_the_client(
    served: Serving, local: api.Client, kind: str, given: dict[str, Any]
) -> None:
    """Event by event, for answers of one token: those of more may be cut differently, by the reader's pace."""
    if kind == "completions" and "logprobs" in given:
        given = {"logprobs": 2}
    fields = fields_of(kind, given) | {"max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}}
    status, body = curl(served, kind, fields)
    assert status == 200
    *events, done = Answer(status, {}, body.encode()).events
    assert done == "[DONE]"
    here = [plain(chunk.to_dict()) for chunk in endpoint(local, kind).create(**fields)]
    assert [plain(event) for event in events] == here
    assert len(here) >= (3 if kind == "chat" else 2)


@needs_curl
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("chat", {"messages": TURNS, "seed": 4}),
        ("chat", {"seed": 1, "n": 3, "stop": ["a", "o", "the"]}),
        ("completions", {"seed": 2, "logprobs": 5, "echo": True}),
        ("chat", {"n": 9}),
        ("completions", {"model": "another"}),
    ],
    ids=lambda one: json.dumps(one)[:60],
)
def test_curl_reads_a_stream(served: Serving, local: api.Client, kind: str, given: dict[str, Any]) -> None:
    fields = fields_of(kind, given) | {"stream": True}
    status, body = curl(served, kind, fields)
    try:
        here: Any = folded([chunk.to_dict() for chunk in endpoint(local, kind).create(**fields)])
    except api.APIError as error:
        assert {"status": status, **json.loads(body)} == {"status": error.status_code, "error": error.body}
    else:
        *events, done = Answer(status, {}, body.encode()).events
        assert (status, done, folded(events)) == (200, "[DONE]", here)


# Run by the interpreter that OPENAI_028_PYTHON names, which has openai 0.28: calls in, outcomes out, as lines of JSON.
CHILD_OF_2023 = """
import json, sys
import openai
openai.api_base, openai.api_key = sys.argv[1], "none"
for line in sys.stdin:
    kind, fields = json.loads(line)
    create = (openai.ChatCompletion if kind == "chat" else openai.Completion).create
    try:
        made = create(**fields)
        outcome = [one.to_dict_recursive() for one in made] if fields.get("stream") else made.to_dict_recursive()
    except openai.error.OpenAIError as error:
        outcome = {"status": error.http_status, "error": error.json_body["error"]}
    print(json.dumps(outcome), flush=True)
"""


@pytest.mark.skipif("OPENAI_028_PYTHON" not in os.environ, reason="OPENAI_028_PYTHON names no interpreter")
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_of_2023_runs_the_script(served: Serving, local: api.Client, stream: bool) -> None:
    script = []
    for kind, given in STREAMED if stream else SCRIPT:
        script.append((kind, wire_fields(fields_of(kind, given)) | {"stream": stream}))
    done = subprocess.run(
        [os.environ["OPENAI_028_PYTHON"], "-c", CHILD_OF_2023, f"{served.url}/v1"],
        input="".join(json.dumps(one) + "\n" for one in script),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    for (kind, fields), there in zip(script, outcomes, strict=True):
        try:
            made = endpoint(local, kind).create(**fields)
            here: Any = folded([chunk.to_dict() for chunk in made]) if stream else plain(made.to_dict())
        except api.APIError as error:
            here = {"status": error.status_code, "error": error.body}
        if "error" not in there:
            there = folded(there) if stream else plain(there)
        assert there == here, fields
