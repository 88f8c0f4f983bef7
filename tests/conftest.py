"""What every test may ask for: the shared test data, where it is there, and a small tokenizer that needs no data."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import sentencepiece

from llama.tokenizer import Tokenizer

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")

# The one place that knows where the shared data lies: beside the project, or where LLAMA_TEST_DATA says.
DATA_FOLDER = Path(os.environ.get("LLAMA_TEST_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")

TINY_TEXT = """
Once upon a time there was a small engine that lived by the sea. It had thirty seats, and every seat had a number.
In the morning the guests came in, one after the other, and each of them asked a question. "How far is it to the hill?"
said the first. "Two miles, or three if it rains," said the engine; "take the path
on the left, then the path on the left again."
The second guest wanted a story: it began with a boat, it went on with a storm, and it ended with bread and warm milk.
Nobody waited long. When two guests spoke at the same time, the engine listened to both, word by word by word.
    for name in names:
        print(name, len(name))
At night the engine counted: 128 questions, 128 answers, 0 mistakes. Then it put out
the lamp, and the sea went on talking.
Der kleine Motor schläft. Le petit moteur dort déjà. El motor pequeño duerme también.
"""


@pytest.fixture(scope="session")
def shared_file() -> Callable[[str], Path]:
    """A function from a path inside the shared data to the file or folder; the test is skipped where there is none."""

    def find(name: str) -> Path:
        path = DATA_FOLDER / name
        if not path.exists():
            pytest.skip(f"needs ../shared/data/{name}")
        return path

    return find


@pytest.fixture(scope="session")
def shared_data(shared_file: Callable[[str], Path]) -> Path:
    """The folder of the shared test data."""
    return shared_file("")


@pytest.fixture(scope="session")
def tiny_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.model` of 400 pieces, trained here, with the settings of Llama-2's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tiny") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_file: Path) -> Tokenizer:
    """400 pieces: control ids 0..2, 256 byte pieces from id 3, then words."""
    return Tokenizer(tiny_tokenizer_file)


@pytest.fixture(scope="session")
def llama2_tokenizer(shared_file: Callable[[str], Path]) -> Tokenizer:
    """The tokenizer of Llama-2 itself: 32,000 pieces."""
    return Tokenizer(shared_file("tokenizer/tokenizer.model"))
