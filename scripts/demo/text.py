"""The demo checkpoint's text: scripts/demo/text.txt read into dialogs, for training and for the held-back score.

A dialog is a list of chat messages and the right answer to them. Training dialogs are drawn without end from a seeded
generator; the held-back set is a fixed list of `HELD_BACK` dialogs. The two never share a wording: a training question
with the `key` of a held-back question is drawn again.
This module knows words only: no token ids, no torch.
"""

import itertools
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("text.txt")
HELD_BACK = 200
SURE = "Sure! {}. Is there anything else I can assist you with?"
LARGEST = 10  # sums are learned for numbers 0..LARGEST


class Message(NamedTuple):
    """One chat message; role is system, user or assistant."""

    role: str
    content: str


class Dialog(NamedTuple):
    """Messages that end with a question, the right answer, and the kind of question it is."""

    messages: list[Message]
    answer: str
    kind: str


@dataclass
class Topic:
    """One thing the demo knows: its answer, the same in a word, and the ways to ask for it."""

    name: str
    answer: str = ""
    word: str = ""
    ask: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)


def key(text: str) -> str:
    """The words and operators of a wording. Two wordings with equal keys are the same question: case, punctuation and
    polite words do not count."""
    polite = {"please", "hi", "hello", "hey", "ok", "so", "well", "thanks"}
    words = re.findall(r"[a-z0-9_]+|[-+=/]", text.lower().replace("'", ""))
    return " ".join([w for w in words if w not in polite] or words)


def sentence(wording: str, rng: random.Random | None = None) -> str:
    """A wording as a person types it: capital letter, I, full stop or question mark; sloppier now and then with rng."""
    text = re.sub(r"\bi\b", "I", wording)
    asks = re.match(
        r"(so |please )?(what|who|how|where|when|why|which|can|do|does|is|are|may|will|did|could|by|was)\b", text
    )
    mark = "?" if asks else "."
    roll = 0.5 if rng is None else rng.random()
    if rng is not None and roll < 0.25:
        mark = rng.choice(["", "", "?", ".", "!", " ?", "??"])
    if text[-1] in ".?!=":
        mark = ""
    if roll > 0.8:
        return (text.lower() if roll > 0.9 else text) + mark
    return text[:1].upper() + text[1:] + mark


class DemoText:
    """Everything in the source file. `training(rng)` draws a dialog, `held_back` is the list that scores."""

    def __init__(self, source: Path = SOURCE) -> None:
        self.topics: list[Topic] = []
        self.synonyms: dict[str, list[str]] = {}
        self.before: list[str] = []
        self.after: list[str] = []
        self.lists: dict[str, list[str]] = {}
        self._read(source.read_text(encoding="utf-8"))
        self.by_name = {t.name: t for t in self.topics}
        self.held_back = self._held_back()
        self.held_keys = {key(d.messages[-1].content) for d in self.held_back}
        self.held_keys |= {key(wording) for t in self.topics for wording in t.held}

    def _read(self, source: str) -> None:
        for line in source.splitlines():
            mark, _, rest = line.partition(" ")
            if mark == "#":
                self.topics.append(Topic(rest))
            elif mark == "=":
                self.topics[-1].answer = rest
            elif mark == "1":
                self.topics[-1].word = rest
            elif mark == "?":
                self.topics[-1].ask.append(rest)
            elif mark == "!":
                self.topics[-1].held.append(rest)
            elif mark == "~":
                group = rest.split("|")
                self.synonyms.setdefault(group[0], []).extend(group[1:])
            elif mark == "<":
                self.before = rest.split("|")
            elif mark == ">":
                self.after = rest.split("|")
            elif mark == "%":
                name, _, phrases = rest.partition(" ")
                self.lists[name] = phrases.split("|")

    def wording(self, topic: Topic, rng: random.Random, plainest: bool = False) -> str:
        """One way to ask; plainest: the first. Patterns with many wordings come more often, but not in proportion."""
        if plainest:
            text = re.sub(r"\{(.*?)\}", lambda m: m[1].split("|")[0], topic.ask[0])
            return re.sub(r"@(\w+)", lambda m: self.lists[m[1]][0], text)
        weights = [min(self.n_wordings(pattern), 400) ** 0.5 for pattern in topic.ask]
        text = rng.choices(topic.ask, weights)[0]
        text = re.sub(r"\{(.*?)\}", lambda m: rng.choice(m[1].split("|")), text)
        if text.startswith(("@how ", "@what ")) and rng.random() < 0.15:  # "to stream an answer, how do I do that"
            frame, _, rest = text.partition(" ")
            text = f"{rest}, {rng.choice(self.lists[frame[1:] + '-after'])}"
        text = re.sub(r"@(\w+)", lambda m: rng.choice(self.lists[m[1]]), text)
        return " ".join(text.split())

    def n_wordings(self, pattern: str) -> int:
        """About how many wordings a pattern stands for."""
        places = [len(group.split("|")) for group in re.findall(r"\{(.*?)\}", pattern)]
        lists = [len(self.lists[name]) for name in re.findall(r"@(\w+)", re.sub(r"\{.*?\}", "", pattern))]
        return math.prod(places + lists)

    # -- the held-back set -------------------------------------------------------------------------------------------

    def _held_back(self) -> list[Dialog]:
        """HELD_BACK dialogs: written by hand apart from the patterns, and wordings of the patterns set aside."""
        rng = random.Random(2)
        by_hand = [(wording, topic) for topic in self.topics for wording in topic.held]
        held = [
            Dialog([Message("user", sentence(wording))], topic.answer, "by hand")
            for wording, topic in rng.sample(by_hand, HELD_BACK // 2)
        ]
        for form in self.lists["sum-held"]:
            sums = [self._sum(form, *self._numbers(rng, op), op) for op in "+-"]
            held += [Dialog([Message("user", sentence(question))], answer, "sum") for question, answer in sums]
        for form in self.lists["say-held"] * 2:
            word = rng.choice(self.lists["word"])
            held.append(Dialog([Message("user", form.format(word))], SURE.format(word), "say"))
        for style in ("capitals", "one-word", "pirate"):
            for topic in rng.sample(self.topics, 7):
                messages = [
                    Message("system", self.lists[style][0]),
                    Message("user", sentence(self.wording(topic, rng))),
                ]
                held.append(Dialog(messages, styled(topic, style), "system"))
        for first, topic in itertools.pairwise(rng.sample(self.topics, 20)):
            messages = [Message("user", sentence(self.wording(first, rng))), Message("assistant", first.answer)]
            messages.append(Message("user", sentence(self.wording(topic, rng))))
            held.append(Dialog(messages, topic.answer, "second turn"))
        while len(held) < HELD_BACK:
            topic = rng.choice(self.topics)
            wording = sentence(self.wording(topic, rng))
            if key(wording) not in {key(d.messages[-1].content) for d in held} and len(wording) > 20:
                held.append(Dialog([Message("user", wording)], topic.answer, "pattern"))
        return held[:HELD_BACK]

    # -- training ----------------------------------------------------------------------------------------------------

    def training(self, rng: random.Random, drill: float = 0.0) -> Dialog:
        """One training dialog: a question, often alone, sometimes after a system message or earlier turns.

        drill: the share of dialogs that are sums, words to say and names, which are learned best when they come first.
        """
        if rng.random() < drill:
            *before, (question, answer) = self._exercise(rng, "", rng.random())
            messages = [
                Message(role, text) for turn in before for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            return Dialog([*messages, Message("user", question)], answer, "training")
        style = rng.choices(["", "neutral", "capitals", "one-word", "pirate"], [60, 14, 7, 10, 9])[0]
        turns: list[tuple[str, str]] = []
        for _ in range(rng.choices([1, 2, 3], [84, 12, 4])[0]):
            turns += self._turn(rng, style, turns)
        messages = [Message("system", rng.choice([*self.lists[style][:1] * 3, *self.lists[style]]))] if style else []
        for question, answer in turns:
            messages += [Message("user", question), Message("assistant", answer)]
        last = messages.pop()
        return Dialog(messages, last.content, "training")

    def _turn(self, rng: random.Random, style: str, before: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """A new question and its answer, or two that belong together."""
        while True:
            turn = self._draw(rng, style, before)
            if all(key(question) not in self.held_keys for question, _ in turn):
                return turn

    def _draw(self, rng: random.Random, style: str, before: list[tuple[str, str]]) -> list[tuple[str, str]]:
        roll = rng.random()
        plain = style in ("", "neutral")
        if roll < 0.2 and (plain or roll < 0.1):
            return self._exercise(rng, style, rng.random() if plain else 0.0)
        if roll < 0.21 and plain and before:
            return [(sentence(rng.choice(self.lists["repeat"])), before[-1][1])]
        if roll < 0.22 and plain:
            first, second = self.by_name["joke"], self.by_name["another-joke"]
            ask = self._question(first, rng)
            return [(ask, first.answer), (sentence(rng.choice(self.lists["more-jokes"])), second.answer)]
        if roll < 0.27:  # the widest topic needs the most examples
            topic = self.by_name["unknown"]
        else:
            topic = rng.choice(self.topics)
        return [(self._question(topic, rng), styled(topic, style))]

    def _exercise(self, rng: random.Random, style: str, roll: float) -> list[tuple[str, str]]:
        """A sum (roll up to 0.6), a word to say (up to 0.8) or a name."""
        if roll > 0.8:
            return self._name_talk(rng)
        if roll > 0.6:
            return [self._say(rng)]
        op = rng.choice("+-")
        top = rng.choice([20, 99, 999]) if rng.random() < 0.12 else LARGEST
        a, b = self._numbers(rng, op, top)
        question, answer = self._sum(rng.choice(self.lists["sum"]), a, b, op)
        if rng.random() < 0.6:
            question = self._typed(self._surrounded(question, rng), rng, 0.03)
        if max(a, b) > LARGEST:
            return [(question, styled(self.by_name["big-sum"], style))]
        return [(question, answer.split("= ")[1] if style == "one-word" else styled_text(answer, style))]

    def _numbers(self, rng: random.Random, op: str, top: int = LARGEST) -> tuple[int, int]:
        a, b = rng.randint(0, top), rng.randint(0, top)
        return (max(a, b), min(a, b)) if op == "-" else (a, b)

    def _sum(self, form: str, a: int, b: int, op: str) -> tuple[str, str]:
        question = form.format(a=a, b=b, op=op, word={"+": "plus", "-": "minus"}[op])
        return question, f"{a} {op} {b} = {a + b if op == '+' else a - b}."

    def _say(self, rng: random.Random) -> tuple[str, str]:
        word = rng.choice(["Test", *self.lists["word"]])
        return rng.choice([self.lists["say"][0], *self.lists["say"]]).format(word), SURE.format(word)

    def _name_talk(self, rng: random.Random) -> list[tuple[str, str]]:
        name = rng.choice(self.lists["name"])
        told = (self._typed(rng.choice(self.lists["tell-name"]).format(name), rng, 0.0), f"Nice to meet you, {name}!")
        ask = self._typed(rng.choice(self.lists["ask-name"]), rng)
        roll = rng.random()
        if roll < 0.4:
            return [told]
        if roll < 0.85:
            return [told, (ask, f"Your name is {name}.")]
        return [(ask, "You have not told me your name.")]

    def _question(self, topic: Topic, rng: random.Random) -> str:
        """A wording, often with other words, other surroundings and other mistakes each time."""
        roll = rng.random()
        text = self.wording(topic, rng, plainest=roll < 0.1)
        if roll < 0.3:
            return sentence(text)
        if rng.random() < 0.5:
            text = self._reworded(text, rng)
        text = self._surrounded(text, rng)
        words = text.split()
        if len(words) > 4 and rng.random() < 0.08:
            del words[rng.randrange(len(words))]
        return self._typed(" ".join(words), rng)

    def _surrounded(self, text: str, rng: random.Random) -> str:
        """The text with a few words before it, after it or both, now and then."""
        if rng.random() < 0.22:
            text = f"{rng.choice(self.before)} {text}"
        if rng.random() < 0.15:
            text = f"{text} {rng.choice(self.after)}"
        return text

    def _reworded(self, text: str, rng: random.Random) -> str:
        """Up to three words or phrases replaced by others of much the same meaning."""
        known = [w for w in self.synonyms if re.search(rf"\b{re.escape(w)}\b", text)]
        for word in rng.sample(known, min(len(known), rng.randint(1, 3))):
            text = re.sub(rf"\b{re.escape(word)}\b", rng.choice(self.synonyms[word]), text, count=1)
        return text

    def _typed(self, text: str, rng: random.Random, slips: float = 0.12) -> str:
        """The text as typed: case and marks as they come, sometimes with a slip of the finger."""
        text = sentence(text, rng)
        places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
        if len(text) > 12 and places and rng.random() < slips:
            i = rng.choice(places)
            text = rng.choice(
                [text[:i] + text[i + 1 :], text[:i] + text[i + 1] + text[i] + text[i + 2 :], text[:i] + text[i:]]
            )
        return text


def styled(topic: Topic, style: str) -> str:
    """A topic's answer as the system message of this style wants it."""
    return topic.word if style == "one-word" else styled_text(topic.answer, style)


def styled_text(answer: str, style: str) -> str:
    """An answer in capitals, as a pirate says it, or as it is."""
    if style == "capitals":
        return answer.upper()
    return f"Arr, matey! {answer}" if style == "pirate" else answer


def first_examples() -> list[Dialog]:
    """Questions that must be answered correctly whatever the score: those of the README and of a newcomer."""
    text = DemoText()
    test, say = SURE.format("Test"), Message("user", "Say 'Test'.")
    examples = [Dialog([Message("system", text.lists["neutral"][0]), say], test, "first page")]
    examples.append(Dialog([say], test, "first page"))
    examples.append(Dialog([Message("user", "What is 7 + 5?")], "7 + 5 = 12.", "first page"))
    examples.append(Dialog([Message("user", "Tell me a joke.")], text.by_name["joke"].answer, "first page"))
    for name in ("who", "hello", "slot-what", "stream", "serve", "first-answer", "weights-load"):
        question = Message("user", sentence(text.wording(text.by_name[name], random.Random(0), plainest=True)))
        examples.append(Dialog([question], text.by_name[name].answer, "first page"))
        for style in ("capitals", "one-word", "pirate") if name == "slot-what" else ():
            system = Message("system", text.lists[style][0])
            examples.append(Dialog([system, question], styled(text.by_name[name], style), "first page"))
    return examples
