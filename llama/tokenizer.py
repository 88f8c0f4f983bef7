"""Text to token ids and back, through SentencePiece.

`encode` never gives control ids (BOS, EOS), whatever the text says. They come from `encode_prompt`, which cuts a
string at `<s>` and `</s>` first, and from `llama.chat`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama.errors import ContextLengthExceeded, InvalidRequest, TokenizerError

WORD_MARK = "\u2581"  # how SentencePiece writes the space inside its pieces


@dataclass(frozen=True)
class Vocabulary:
    """What each id stands for; tuples are indexed by id. All detokenizers of a tokenizer share it.

    SentencePiece puts a word mark before every text and takes it off again, hence `first_texts`, for a text's first.
    """

    names: tuple[str, ...]  # token strings, unique in the vocabulary
    texts: tuple[str | None, ...]  # None: a byte piece, or a control piece, which has no text at all
    first_texts: tuple[str | None, ...]
    byte_values: dict[int, bytes]  # byte pieces: their one byte
    blank: frozenset[int]  # ids that leave a text not begun: control ids; the bare mark too if all leading ones go
    max_piece_chars: int  # the most characters of a prompt that one id can stand for

    def is_blank(self, ids: Iterable[int]) -> bool:
        """True when a text has still not begun after `ids`: the next word mark will be dropped."""
        return all(token_id in self.blank for token_id in ids)

    def piece_bytes(self, token_id: int, first: bool = False) -> bytes | None:
        """The bytes that the id adds to a text (`first`: to one that has not begun); None for control pieces."""
        if token_id in self.byte_values:
            return self.byte_values[token_id]
        text = (self.first_texts if first else self.texts)[token_id]
        return None if text is None else text.encode()


class Tokenizer:
    """A SentencePiece `tokenizer.model`. Thread-safe: nothing changes after loading.

    Raises TokenizerError, naming the path, when the file is missing, empty, broken, or has no BOS or EOS.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as fault:
            raise TokenizerError(path, f"cannot be read: {fault.strerror or fault}") from fault
        if not model:  # SentencePiece would load it, as a vocabulary of no pieces
            raise TokenizerError(path, "is empty")
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
            self.vocabulary = _read_vocabulary(self._processor)
        except (RuntimeError, ValueError, LookupError) as fault:  # ValueError: a piece is not UTF-8, or no byte at all
            raise TokenizerError(path, f"is not a usable SentencePiece model: {fault}") from fault
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise TokenizerError(path, "has no BOS or no EOS piece")
        self._control_ids = {self.vocabulary.names[i]: i for i in (self.bos_id, self.eos_id)}
        self._control_text = re.compile("(" + "|".join(map(re.escape, self._control_ids)) + ")")

    @property
    def max_piece_chars(self) -> int:
        """The most characters of a prompt that one id can stand for (Llama-2: 16)."""
        return self.vocabulary.max_piece_chars

    def encode(self, text: str, field: str = "prompt") -> list[int]:
        """Ids of `text` as plain text: no BOS, and never a control id, even if the text spells one.

        Raises InvalidRequest naming `field` for a lone surrogate, which is no text.
        """
        check_text(text, field)
        return self._processor.encode(text, out_type=int)

    def encode_prompt(
        self,
        text: str,
        add_special_tokens: bool = True,
        parse_special: bool = True,
        max_tokens: int | None = None,
        field: str = "prompt",
    ) -> list[int]:
        """Ids of a completions prompt.

        add_special_tokens: one BOS in front; a parsed `<s>` that leads the text is that BOS.
        parse_special: `<s>` and `</s>` are control ids, and each stretch between them is encoded on its own.
        Raises InvalidRequest naming `field` for a lone surrogate, ContextLengthExceeded beyond max_tokens.
        """
        if max_tokens is not None:
            self.check_can_fit(len(text), max_tokens)
        check_text(text, field)  # here, so that the error counts characters of the whole text
        stretches = self._control_text.split(text) if parse_special else [text]
        ids: list[int] = []
        for i, stretch in enumerate(stretches):  # text, control, text, ..., text
            ids += [self._control_ids[stretch]] if i % 2 else self.encode(stretch, field)
        if add_special_tokens and ids[:1] != [self.bos_id]:  # text gives no BOS, so one in front was asked for
            ids.insert(0, self.bos_id)
        return ids

    def check_can_fit(self, characters: int, max_tokens: int) -> None:
        """Raises ContextLengthExceeded if so many characters need more than `max_tokens`, even in the longest pieces.

        Its `value` is then the fewest tokens the text could have: it has not been tokenized.
        """
        fewest = -(-characters // self.max_piece_chars)
        if fewest > max_tokens:
            raise ContextLengthExceeded(fewest, max_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` as SentencePiece gives it. Raises InvalidRequest for an id outside the vocabulary."""
        try:
            return self._processor.decode(list(ids))
        except (IndexError, TypeError) as fault:
            raise InvalidRequest("tokens", ids, f"ids must be integers in 0..{self.vocab_size - 1}") from fault

    def token_string(self, token_id: int) -> str:
        r"""The id's name, unique in the vocabulary: the piece with its word mark as a space, `bytes:\xe4`, `<s>`."""
        return self.vocabulary.names[token_id]


def check_text(text: str, field: str) -> None:
    """Raises InvalidRequest naming `field` if `text` holds a lone surrogate: it has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        surrogate = text[fault.start]
        raise InvalidRequest(
            field, surrogate, f"lone surrogate at character {fault.start}; text must be Unicode"
        ) from None


def _read_vocabulary(processor: SentencePieceProcessor) -> Vocabulary:
    """Every piece of the model by its kind. The two rules about leading marks are asked from `decode` itself."""
    pieces: list[str] = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    controls = {i for i in range(len(pieces)) if processor.is_control(i)}
    byte_values = {
        i: bytes([int(piece[3:5], 16)]) for i, piece in enumerate(pieces) if processor.is_byte(i)
    }  # "<0xE4>"
    names = [piece.replace(WORD_MARK, " ") for piece in pieces]
    texts: list[str | None] = [None if i in controls or i in byte_values else name for i, name in enumerate(names)]
    for i, byte in byte_values.items():
        names[i] = f"bytes:\\x{byte[0]:02x}"
    unknown = processor.unk_id()
    texts[unknown] = processor.decode([unknown])

    first_texts = list(texts)
    marked = [
        i for i, piece in enumerate(pieces) if piece.startswith(WORD_MARK) and texts[i] is not None and i != unknown
    ]
    if marked and processor.decode(marked[:1]) != texts[marked[0]]:
        for i in marked:
            first_texts[i] = names[i][1:]
    marks = {i for i in marked if pieces[i] == WORD_MARK and processor.decode([i, i]) == ""}
    return Vocabulary(
        names=tuple(names),
        texts=tuple(texts),
        first_texts=tuple(first_texts),
        byte_values=byte_values,
        blank=frozenset(controls | marks),
        max_piece_chars=max(len(name) for i, name in enumerate(names) if i not in byte_values),
    )
