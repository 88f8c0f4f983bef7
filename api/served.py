"""`Served`: one model in this process, with its engine and its names, and what a request to it becomes.

`Models` holds those of one client.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import llama
from api.answer import Answer, ChatAnswer, Compat, CompletionAnswer, Heading
from api.arguments import Arguments, read
from api.checks import Context, Endpoint, message_list, token_id
from api.echo import Prompt, from_ids, from_text
from api.errors import BadRequestError, NotFoundError, ServiceUnavailableError, bad_type, no_such_model, translated
from api.fingerprint import fingerprint
from api.schema import Health, Model, Text, Tokens
from llama.chat import render
from llama.config import Limits
from llama.slots import Seat
from llama.stream import Stream
from llama.tokenizer import Tokenizer

# A step thread that has work and has not moved for so many seconds is stalled.
STALLED_AFTER = 2.0


@dataclass(frozen=True)
class Settings:
    """What a client was made with, besides its engines' options."""

    wait: float | bool | None = None
    strict: bool = False
    compat: Compat = "openai"
    special_tags: Literal["refuse", "text"] = "refuse"
    chat: bool = True
    limits: Limits = field(default_factory=Limits)


class Served:
    """A model being served: its engine, its names, and what requests to it become."""

    def __init__(self, engine: llama.Engine, names: Sequence[str], settings: Settings) -> None:
        assert engine.tokenizer is not None and engine.model_dir is not None, (
            "a checkpoint has a folder and a tokenizer"
        )
        self.engine, self.names, self.settings = engine, tuple(names), settings
        self.tokenizer: Tokenizer = engine.tokenizer
        self.created = int(time.time())
        self.fingerprint = fingerprint(engine.model_dir, engine)
        self._context = Context("chat", settings.limits, engine.model_config.vocab_size)
        engine.limits = settings.limits

    @property
    def name(self) -> str:
        return self.names[0]

    def read(self, endpoint: Endpoint, fields: Mapping[str, Any]) -> Arguments:
        """The request, checked against this model. Raises BadRequestError, NotFoundError."""
        if endpoint == "chat" and not self.settings.chat:
            raise NotFoundError(f"'{self.name}' is not a chat model.", param="model", code="not_a_chat_model")
        return read(
            endpoint,
            fields,
            vocab_size=self.engine.model_config.vocab_size,
            limits=self.settings.limits,
            strict=self.settings.strict,
        )

    def prompts(self, arguments: Arguments) -> list[Prompt]:
        """The prompts as token ids. Raises the engine's errors."""
        if arguments.endpoint == "chat":
            return [Prompt(self._render(arguments.messages))]
        return [
            self._from_text(item, arguments.add_special_tokens, arguments.parse_special)
            if isinstance(item, str)
            else from_ids(item, self.tokenizer, arguments.echo)
            for item in arguments.prompts
        ]

    def begin(self, arguments: Arguments, seat: Seat, salt: str = "") -> tuple[Stream, Answer[Any, Any]]:
        """Tokenize and submit. The seat is given back if anything is raised: the engine's errors."""
        params = arguments.params
        if arguments.explain and params.seed is None and len(arguments.prompts) <= 1:
            params = replace(params, seed=secrets.randbits(63))
        alone = arguments.endpoint == "chat" or self.settings.compat == "anyscale"
        try:
            prompts = self.prompts(arguments)
            request = llama.Request(
                [prompt.ids for prompt in prompts],
                params,
                n=arguments.best_of,
                salt=salt,
                chat=alone,
                trace=arguments.explain,
            )
        except BaseException:
            seat.release()
            raise
        stream = self.engine.submit(request, seat=seat)
        heading = Heading(self.name, int(time.time()), self.fingerprint, self.settings.compat)
        kind = ChatAnswer if arguments.endpoint == "chat" else CompletionAnswer
        return stream, kind(arguments, heading, prompts, self.tokenizer.vocabulary, stream.stats, params.seed)

    def describe(self) -> Model:
        return Model(
            id=self.name,
            object="model",
            created=self.created,
            owned_by="llama-slots",
            max_model_len=self.engine.max_seq_len,
        )

    def health(self) -> Health:
        stats = self.engine.stats()
        busy = stats.running + stats.waiting > 0
        status: Literal["ok", "stalled", "stopped"] = "ok"
        if not self.engine.serving:
            status = "stopped"
        elif busy and stats.heartbeat_age > STALLED_AFTER:
            status = "stalled"
        return Health(
            status=status,
            heartbeat_age=stats.heartbeat_age,
            slots=stats.slots,
            slots_in_use=stats.slots_in_use,
        )

    def tokenize(
        self,
        prompt: Any = None,
        messages: Any = None,
        add_special_tokens: bool = True,
        parse_special: bool = True,
        return_token_strs: bool = False,
    ) -> Tokens:
        """The ids that a request with this prompt, or these messages, would have. Raises BadRequestError."""
        if (prompt is None) == (messages is None):
            raise BadRequestError("Either 'prompt' or 'messages' is needed.", param="prompt")
        with translated("prompt" if messages is None else "messages"):
            if messages is None:
                if not isinstance(prompt, str):
                    raise bad_type("prompt", prompt, "a string")
                ids = self._from_text(prompt, add_special_tokens, parse_special).ids
            else:
                ids = self._render(message_list("messages", messages, self._context))
        tokens = Tokens(tokens=ids, count=len(ids), max_model_len=self.engine.max_seq_len)
        if return_token_strs:
            tokens.set(token_strs=[self.tokenizer.token_string(one) for one in ids])
        return tokens

    def detokenize(self, tokens: Any) -> Text:
        """The text of token ids. Raises BadRequestError."""
        if not isinstance(tokens, (list, tuple)):
            raise bad_type("tokens", tokens, "a list of token ids")
        return Text(prompt=self.tokenizer.decode([token_id("tokens", one, self._context) for one in tokens]))

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return render(messages, self.tokenizer, self.settings.special_tags, self.engine.max_seq_len)

    def _from_text(self, text: str, add_bos: bool, parse_special: bool) -> Prompt:
        double = self.settings.compat == "anyscale"
        return from_text(
            text,
            self.tokenizer,
            self.engine.max_seq_len,
            add_bos=add_bos,
            parse_special=parse_special,
            double_bos=double,
        )


class Models:
    """The models of one client, by name. The first is the default."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._served: list[Served] = []
        self._by_name: dict[str, Served] = {}
        self._pid = os.getpid()

    def load(
        self,
        model: str | Path,
        served_name: str | None,
        aliases: Sequence[str],
        config: llama.EngineConfig,
        progress: bool,
    ) -> Served:
        """Load a checkpoint and serve it. Raises ValueError for a name that is taken; the engine's errors."""
        name = served_name or Path(model).name or Path(model).resolve().name
        names = list(dict.fromkeys([name, *aliases, str(model)]))
        taken = [name for name in names if name in self._by_name]
        if taken:
            raise ValueError(f"another model is already served as {taken[0]!r}")
        served = Served(llama.Engine(model, config, progress=progress), names, self.settings)
        self._served.append(served)
        self._by_name.update(dict.fromkeys(names, served))
        return served

    def find(self, name: Any = None) -> Served:
        """The model of that name. Raises NotFoundError; ServiceUnavailableError in a process forked from ours."""
        if os.getpid() != self._pid:
            # Locks and threads do not survive a fork in one piece; nothing of the engine may be touched.
            raise ServiceUnavailableError("This client was made before fork(); make one in the child process.")
        if name is None:
            return self._served[0]
        if not isinstance(name, str):
            raise bad_type("model", name, "a string")
        if name not in self._by_name:
            raise no_such_model(name)
        return self._by_name[name]

    def all(self) -> list[Served]:
        self.find()
        return list(self._served)

    def close(self) -> None:
        """Close every engine; their memory is free when this returns."""
        for served in self._served:
            served.engine.close()
