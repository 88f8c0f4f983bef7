"""The chat prompt: Meta's ids, what is refused, and no way for content to forge a control token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.chat import SPECIAL_TAGS, render, render_turns
from llama.errors import ChatFormatError, ContextLengthExceeded, InvalidRequest
from llama.tokenizer import Tokenizer

SharedFile = Callable[[str], Path]


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def documented_string(messages: list[dict[str, Any]]) -> str:
    """The prompt as one string, as the format is usually printed: what a caller would send to completions."""
    texts = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
    pairs = zip(texts[0::2], texts[1::2], strict=False)
    answered = [f"<s>[INST] {question.strip()} [/INST] {answer.strip()} </s>" for question, answer in pairs]
    return "".join(answered) + f"<s>[INST] {texts[-1].strip()} [/INST]"


# --- the real vocabulary ---------------------------------------------------------------------------------------------


def test_ids_are_those_of_metas_own_code(llama2_tokenizer: Tokenizer, shared_file: SharedFile) -> None:
    cases = json.loads(shared_file("vectors/llama2_chat_prompt_ids.json").read_text())["cases"]
    assert len(cases) == 60
    refused = []
    for case in cases:
        messages = case["messages"]
        assert render(messages, llama2_tokenizer, special_tags="text") == case["ids"], case["source"]
        assert llama2_tokenizer.encode_prompt(documented_string(messages)) == case["ids"], case["source"]
        if any(tag in message["content"] for message in messages for tag in SPECIAL_TAGS):
            refused.append(case["source"])
            with pytest.raises(ChatFormatError):
                render(messages, llama2_tokenizer)
        else:
            assert render(messages, llama2_tokenizer) == case["ids"]
    assert refused == ["meta-llama/llama example_chat_completion.py dialog 5"]


def test_golden_usage_of_chat(llama2_tokenizer: Tokenizer) -> None:
    prompt = render([system("You are a helpful assistant."), user("Say 'Test'.")], llama2_tokenizer)
    assert (len(prompt), prompt[0], prompt.count(1)) == (32, 1, 1)
    answer = llama2_tokenizer.encode(" Sure! Test. Is there anything else I can assist you with?")
    assert answer[:2] == [29871, 18585]
    assert len(answer) + 1 == 16, "EOS is counted"
    assert len(prompt) + len(answer) + 1 == 48
    assert llama2_tokenizer.decode(answer) == " Sure! Test. Is there anything else I can assist you with?"


# --- the format ------------------------------------------------------------------------------------------------------


def test_turns_as_text() -> None:
    assert render_turns([user(" Hi \n")]) == ["[INST] Hi [/INST]"]
    assert render_turns([user("a"), assistant(" b\n"), user("c")]) == ["[INST] a [/INST] b ", "[INST] c [/INST]"]
    assert render_turns([system(" s "), user(" a ")]) == ["[INST] <<SYS>>\n s \n<</SYS>>\n\n a [/INST]"]
    assert render_turns([system(""), user("a")]) == ["[INST] <<SYS>>\n\n<</SYS>>\n\na [/INST]"], "the block stays"
    assert render_turns([user("")]) == ["[INST]  [/INST]"]


def test_ids_of_turns(tiny_tokenizer: Tokenizer) -> None:
    encode = tiny_tokenizer.encode
    messages = [system("be short"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    first, second, last = render_turns(messages)
    assert render(messages, tiny_tokenizer) == [1, *encode(first), 2, 1, *encode(second), 2, 1, *encode(last)]


def test_developer_is_system() -> None:
    developer = {"role": "developer", "content": "s"}
    assert render_turns([developer, user("a")]) == render_turns([system("s"), user("a")])


def test_content_parts_are_joined_as_they_are() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert render_turns([user(parts)]) == ["[INST] one two [/INST]"]
    assert render_turns([user([])]) == render_turns([user("")])


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([system("s")], "messages[0].role"),
        ([assistant("b")], "messages[0].role"),
        ([system("s"), assistant("b"), user("a")], "messages[1].role"),
        ([system("s"), system("s"), user("a")], "messages[1].role"),
        ([user("a"), system("s"), user("a")], "messages[1].role"),
        ([user("a"), user("a")], "messages[1].role"),
        ([user("a"), assistant("b")], "messages[1].role"),
        ([user("a"), assistant("b"), assistant("b"), user("a")], "messages[2].role"),
        ([user("a"), assistant("b"), {"role": "tool", "content": None}], "messages[2].role"),
        ([user("a"), {"role": "function", "content": "x"}], "messages[1].role"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role"),
    ],
)
def test_roles_out_of_order_are_named(messages: list[dict[str, Any]], field: str) -> None:
    with pytest.raises(ChatFormatError) as caught:
        render_turns(messages)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "user"}, "messages[0].content"),
        (user(None), "messages[0].content"),
        (user(3), "messages[0].content"),
        (user(b"bytes"), "messages[0].content"),
        (user(["a"]), "messages[0].content[0]"),
        (user([{"type": "text", "text": "a"}, {"type": "image_url"}]), "messages[0].content[1]"),
        (user([{"type": "text", "text": None}]), "messages[0].content[0]"),
        (user("a\ud800"), "messages[0].content"),
        ("hello", "messages[0]"),
    ],
)
def test_content_that_is_no_text_is_named(message: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render_turns([message])
    assert caught.value.field == field
    assert not isinstance(caught.value, ChatFormatError)


@pytest.mark.parametrize("tag", SPECIAL_TAGS)
def test_tags_of_the_format_are_refused_in_any_role(tag: str, tiny_tokenizer: Tokenizer) -> None:
    good = [system("s"), user("a"), assistant("b"), user("c")]
    for i in range(len(good)):
        messages = [*good]
        messages[i] = {**good[i], "content": f"x{tag}y"}
        with pytest.raises(ChatFormatError) as caught:
            render(messages, tiny_tokenizer)
        assert (caught.value.field, caught.value.value) == (f"messages[{i}].content", tag)
        assert tag in "".join(render_turns(messages, special_tags="text"))
    split = user([{"type": "text", "text": tag[:3]}, {"type": "text", "text": tag[3:]}])
    with pytest.raises(ChatFormatError):
        render([split], tiny_tokenizer)


@given(contents=st.lists(st.text(alphabet="<s>/INSTY[] \nab", max_size=12), min_size=2, max_size=6))
def test_content_cannot_forge_control_tokens(tiny_tokenizer: Tokenizer, contents: list[str]) -> None:
    roles = ["system", *["user", "assistant"] * 3][: len(contents)]
    roles, contents = (roles, contents) if roles[-1] == "user" else (roles[:-1], contents[:-1])
    if not roles or roles[-1] != "user":
        roles, contents = ["user"], ["</s><s>"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    ids = render(messages, tiny_tokenizer, special_tags="text")
    answers = roles.count("assistant")
    assert (ids[0], ids.count(1), ids.count(2), ids.count(0)) == (1, answers + 1, answers, 0)


def test_conversation_that_cannot_fit_is_refused_before_tokenizing(tiny_tokenizer: Tokenizer) -> None:
    messages = [user("a" * 1000)]
    assert render(messages, tiny_tokenizer, max_tokens=1000) == render(messages, tiny_tokenizer)
    with pytest.raises(ContextLengthExceeded) as caught:
        render(messages, tiny_tokenizer, max_tokens=100)
    assert caught.value.limit_tokens == 100
