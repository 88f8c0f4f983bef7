"""Messages to prompt ids, in the format that Llama-2-chat was trained on.

    an answered pair    BOS  [INST] user [/INST] answer·  EOS        (· is one space)
    the last turn       BOS  [INST] user [/INST]
    a system message    folded into the first user text, with the tags <<SYS>> and <</SYS>> on lines of their own

Every turn is encoded on its own, as plain text, so no content can forge BOS or EOS. Content that spells the format's
tags is refused, unless the operator lets it through.
Source: meta-llama/llama, `generation.py`; the tests compare with ids that this code gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llama.errors import ChatFormatError, InvalidRequest
from llama.tokenizer import Tokenizer, check_text

SPECIAL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    special_tags: Literal["refuse", "text"] = "refuse",
    max_tokens: int | None = None,
) -> list[int]:
    """Prompt ids of a conversation: an optional system message, then user, assistant, user, ..., user.

    messages: {"role", "content"} each; content is a string or a list of {"type": "text", "text": ...} parts, joined as
    they are.
    special_tags: what becomes of content that spells a tag of the format; "text" lets it through as text.
    max_tokens: what the context holds; a conversation that cannot fit is refused before tokenizing.
    Raises ChatFormatError naming `messages[i].role` for a wrong role or order, or `messages[i].content` for a tag;
    InvalidRequest naming the field for content that is no text; ContextLengthExceeded.
    """
    turns = render_turns(messages, special_tags)
    if max_tokens is not None:
        tokenizer.check_can_fit(sum(map(len, turns)), max_tokens)
    ids: list[int] = []
    for turn in turns:
        ids += [tokenizer.bos_id, *tokenizer.encode(turn, "messages"), tokenizer.eos_id]
    return ids[:-1]  # the last turn has no answer yet, so no EOS


def render_turns(
    messages: Sequence[Mapping[str, Any]], special_tags: Literal["refuse", "text"] = "refuse"
) -> list[str]:
    """The text of each turn, without BOS and EOS; the last ends where the answer begins. Raises as `render` does."""
    if not messages:
        raise ChatFormatError("messages", messages, "at least one message, from the user, is needed")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"messages[{i}]", message, "must be an object with role and content")
    has_system = _check_roles([message.get("role") for message in messages])
    contents = [_content(message, i, special_tags) for i, message in enumerate(messages)]
    if has_system:
        system, user, *rest = contents
        # Folded before stripping, as Meta does: the system text keeps its own spaces, and an empty one its empty block.
        contents = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}", *rest]
    questions = [f"[INST] {user.strip()} [/INST]" for user in contents[0::2]]
    answered = [f"{q} {answer.strip()} " for q, answer in zip(questions, contents[1::2], strict=False)]
    return [*answered, questions[-1]]


def _check_roles(roles: Sequence[object]) -> bool:
    """Whether the conversation opens with a system message. Raises ChatFormatError at the first role out of place."""
    has_system = roles[0] in ("system", "developer")
    for i, role in enumerate(roles):
        if i == 0 and has_system:
            continue
        expected = "user" if (i - has_system) % 2 == 0 else "assistant"
        if role != expected:
            order = "an optional system message, then user and assistant in turn"
            raise ChatFormatError(f"messages[{i}].role", role, f"'{expected}' expected here: {order}")
    if roles[-1] != "user":
        raise ChatFormatError(f"messages[{len(roles) - 1}].role", roles[-1], "the last message must be from the user")
    return has_system


def _content(message: Mapping[str, Any], index: int, special_tags: Literal["refuse", "text"]) -> str:
    """The message's content as one string, checked."""
    field = f"messages[{index}].content"
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join([_part_text(part, f"{field}[{j}]") for j, part in enumerate(content)])
    if not isinstance(content, str):
        raise InvalidRequest(field, content, "must be a string or a list of text parts")
    check_text(content, field)
    if special_tags != "text":
        for tag in SPECIAL_TAGS:
            if tag in content:
                raise ChatFormatError(field, tag, "tags of the chat format may not appear in content")
    return content


def _part_text(part: object, field: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequest(field, part, 'must be {"type": "text", "text": <string>}')
    return part["text"]
