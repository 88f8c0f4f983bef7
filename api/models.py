"""`ServedModel`: a model in this process, with its engine and its names; `Models`: those of one client."""

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
from api.arguments import Arguments
from api.checks import Context, Messages, token_id
from api.errors import BadRequestError, ServiceUnavailableError, bad_type, no_such_model, translated
from api.fingerprint import fingerprint
from api.prompt import Prompt, from_ids, from_text
from api.schema import Health, Model, Text, Tokens
from llama.chat import render
from llama.config import EngineConfig, Limits
from llama.request import Request as EngineRequest
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


class ServedModel:
    """A model being served: its engine, its names, and what requests to it become."""

    def __init__(self, engine: llama.Engine, names: Sequence[str], settings: Settings) -> None:
        assert engine.tokenizer and engine.model_dir, "a checkpoint has a folder and a tokenizer"
        self.engine, self.name, self.settings = engine, names[0], settings
        self.tokenizer: Tokenizer = engine.tokenizer
        self.vocab_size = engine.model_config.vocab_size
        self.created = int(time.time())
        self.fingerprint = fingerprint(engine.model_dir, engine)

    def begin(self, arguments: Arguments, seat: Seat, salt: str = "") -> tuple[Stream, Answer[Any, Any]]:
        """Tokenize and submit. The seat is given back if anything is raised: the engine's errors."""
        params, chat = arguments.params, arguments.endpoint == "chat"
        if arguments.explain and params.seed is None and len(arguments.prompts) <= 1:
            params = replace(params, seed=secrets.randbits(63))
        try:
            prompts = self._prompts(arguments)
        except BaseException:
            seat.release()
            raise
        request = EngineRequest(
            [prompt.ids for prompt in prompts],
            params,
            n=arguments.best_of,
            salt=salt,
            chat=chat or self.settings.compat == "anyscale",
            trace=arguments.explain,
        )
        stream = self.engine.submit(request, seat=seat)
        heading = Heading(self.name, int(time.time()), self.fingerprint, self.settings.compat)
        kind = ChatAnswer if chat else CompletionAnswer
        return stream, kind(arguments, heading, prompts, self.tokenizer.vocabulary, stream.stats, params.seed)

    def describe(self) -> Model:
        context = self.engine.max_seq_len
        return Model(id=self.name, object="model", created=self.created, owned_by="llama-slots", max_model_len=context)

    def health(self) -> Health:
        stats = self.engine.stats()
        age, busy = stats.heartbeat_age, stats.running + stats.waiting > 0
        status: Literal["ok", "stalled", "stopped"] = "stalled" if busy and age > STALLED_AFTER else "ok"
        if not self.engine.serving:
            status = "stopped"
        return Health(status=status, heartbeat_age=age, slots=stats.slots, slots_in_use=stats.slots_in_use)

    def tokenize(
        self, prompt: Any, messages: Any, add_special_tokens: bool, parse_special: bool, return_token_strs: bool
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
                ids = self._render(Messages().check("messages", messages, self._context()))
        tokens = Tokens(tokens=ids, count=len(ids), max_model_len=self.engine.max_seq_len)
        if return_token_strs:
            tokens.token_strs = [self.tokenizer.token_string(i) for i in ids]
        return tokens

    def detokenize(self, tokens: Any) -> Text:
        """The text of token ids. Raises BadRequestError."""
        if not isinstance(tokens, (list, tuple)):
            raise bad_type("tokens", tokens, "a list of token ids")
        return Text(prompt=self.tokenizer.decode([token_id("tokens", i, self._context()) for i in tokens]))

    def _context(self) -> Context:
        return Context("chat", self.settings.limits, self.vocab_size)

    def _prompts(self, arguments: Arguments) -> list[Prompt]:
        """The prompts as token ids. Raises the engine's errors."""
        if arguments.endpoint == "chat":
            return [Prompt(self._render(arguments.messages))]
        return [
            self._from_text(item, arguments.add_special_tokens, arguments.parse_special)
            if isinstance(item, str)
            else from_ids(item, self.tokenizer, arguments.echo)
            for item in arguments.prompts
        ]

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return render(messages, self.tokenizer, self.settings.special_tags, self.engine.max_seq_len)

    def _from_text(self, text: str, add_bos: bool, parse_special: bool) -> Prompt:
        double_bos, most = self.settings.compat == "anyscale", self.engine.max_seq_len
        return from_text(
            text, self.tokenizer, most, add_bos=add_bos, parse_special=parse_special, double_bos=double_bos
        )


class Models:
    """The models of one client, by name. The first is the default."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._served: list[ServedModel] = []
        self._by_name: dict[str, ServedModel] = {}
        self._pid = os.getpid()

    def load(
        self, model: str | Path, served_name: str | None, aliases: Sequence[str], config: EngineConfig, progress: bool
    ) -> ServedModel:
        """Load a checkpoint and serve it. Raises ValueError for a name that is taken; the engine's errors."""
        name = served_name or Path(model).name or Path(model).resolve().name
        names = list(dict.fromkeys([name, *aliases, str(model)]))
        taken = [name for name in names if name in self._by_name]
        if taken:
            raise ValueError(f"another model is already served as {taken[0]!r}")
        engine = llama.Engine(model, config, progress=progress, limits=self.settings.limits)
        served = ServedModel(engine, names, self.settings)
        self._served.append(served)
        self._by_name.update(dict.fromkeys(names, served))
        return served

    def find(self, name: Any = None) -> ServedModel:
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

    def all(self) -> list[ServedModel]:
        self.find()
        return list(self._served)

    def close(self) -> None:
        """Close every engine; their memory is free when this returns."""
        for served in self._served:
            served.engine.close()
