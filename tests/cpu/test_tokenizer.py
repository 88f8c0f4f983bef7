"""Tokenizer: the ids that others expect, control ids only where they are meant, and clear errors for bad files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.errors import ContextLengthExceeded, InvalidRequest, TokenizerError
from llama.tokenizer import Tokenizer

SharedFile = Callable[[str], Path]


def vector_cases(shared_file: SharedFile, kind: str) -> list[dict]:
    return json.loads(shared_file("vectors/llama2_tokenizer.json").read_text())[kind]


# --- the real vocabulary ---------------------------------------------------------------------------------------------


def test_llama2_facts(llama2_tokenizer: Tokenizer) -> None:
    t = llama2_tokenizer
    assert (t.vocab_size, t.unk_id, t.bos_id, t.eos_id, t.max_piece_chars) == (32000, 0, 1, 2, 16)


def test_llama2_encode_vectors(llama2_tokenizer: Tokenizer, shared_file: SharedFile) -> None:
    cases = [case for case in vector_cases(shared_file, "encode") if "note" not in case]
    assert len(cases) == 45
    for case in cases:
        ids = case["ids"][1:] if case["bos"] else case["ids"]
        assert llama2_tokenizer.encode(case["text"]) == ids
        assert llama2_tokenizer.encode_prompt(case["text"]) == [1, *ids]
        assert llama2_tokenizer.encode_prompt(case["text"], add_special_tokens=False) == ids


def test_llama2_special_token_vectors(llama2_tokenizer: Tokenizer, shared_file: SharedFile) -> None:
    """Two cases parse `<s>` in text. Control ids stand where ours do; between them we encode each stretch on its own,
    so the words there get the mark that `legacy=False` takes away."""
    bos, hello = (case for case in vector_cases(shared_file, "encode") if "note" in case)
    assert bos["text"] == "<s>"
    assert [1, *llama2_tokenizer.encode_prompt("<s>", add_special_tokens=False)] == bos["ids"]
    assert llama2_tokenizer.encode_prompt("<s>") == [1], "one BOS, never two"

    assert (hello["text"], hello["ids"]) == ("<s> Hello<s>how", [1, 15043, 1, 3525])
    encode = llama2_tokenizer.encode
    assert llama2_tokenizer.encode_prompt(hello["text"]) == [1, *encode(" Hello"), 1, *encode("how")]
    for case in (bos, hello):
        assert not {1, 2} & set(encode(case["text"]))


def test_llama2_decode_vectors(llama2_tokenizer: Tokenizer, shared_file: SharedFile) -> None:
    for case in vector_cases(shared_file, "decode"):
        assert llama2_tokenizer.decode(case["ids"]) == case["text"]


def test_llama2_token_strings_are_unique(llama2_tokenizer: Tokenizer) -> None:
    names = [llama2_tokenizer.token_string(i) for i in range(32000)]
    assert len(set(names)) == 32000
    assert names[:3] == ["<unk>", "<s>", "</s>"]
    assert (names[29871], names[3 + 0xE4], names[18585]) == (" ", "bytes:\\xe4", " Sure")


@pytest.mark.parametrize("model", ["stories260K-hf", "babyllama361-hf"])
def test_token_strings_of_small_models_are_unique(model: str, shared_file: SharedFile) -> None:
    tokenizer = Tokenizer(shared_file(f"models/{model}/tokenizer.model"))
    assert len(set(tokenizer.vocabulary.names)) == tokenizer.vocab_size


def test_golden_usage_of_completions(llama2_tokenizer: Tokenizer) -> None:
    prompt = "<s>[INST] Tell me a joke. [/INST]"
    ids = llama2_tokenizer.encode_prompt(prompt)
    assert (len(ids), ids[0], ids.count(1)) == (14, 1, 1)
    assert llama2_tokenizer.encode_prompt(prompt, parse_special=False)[:2] == [1, 529], "there it is text: ' <'"


# --- a vocabulary trained here ---------------------------------------------------------------------------------------


def test_tiny_facts(tiny_tokenizer: Tokenizer) -> None:
    t = tiny_tokenizer
    assert (t.vocab_size, t.unk_id, t.bos_id, t.eos_id, t.max_piece_chars) == (400, 0, 1, 2, 7)
    assert len(set(t.vocabulary.names)) == 400


@given(text=st.one_of(st.text(), st.text(alphabet="<s/>unk0xE4 \n\u2581[INST]", max_size=40)))
def test_text_never_gives_control_ids_and_comes_back(tiny_tokenizer: Tokenizer, text: str) -> None:
    ids = tiny_tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids)
    # The mark itself is how a space is written, so it comes back as one.
    assert tiny_tokenizer.decode(ids) == text.replace("\u2581", " ")


@given(text=st.lists(st.sampled_from(["<s>", "</s>", "a word", " ", "<", "s>", "é"]), max_size=6).map("".join))
def test_prompt_has_one_bos_in_front(tiny_tokenizer: Tokenizer, text: str) -> None:
    ids = tiny_tokenizer.encode_prompt(text)
    assert ids[0] == 1
    assert ids.count(1) == max(1, text.count("<s>") + (not text.startswith("<s>")))
    assert ids.count(2) == text.count("</s>")
    assert tiny_tokenizer.encode_prompt(text, parse_special=False) == [1, *tiny_tokenizer.encode(text)]
    bare = tiny_tokenizer.encode_prompt(text, add_special_tokens=False)
    assert ids == (bare if text.startswith("<s>") else [1, *bare])


def test_stretches_between_control_tokens_are_encoded_alone(tiny_tokenizer: Tokenizer) -> None:
    one, two = tiny_tokenizer.encode("one sea"), tiny_tokenizer.encode(" two")
    assert tiny_tokenizer.encode_prompt("<s>one sea</s><s> two") == [1, *one, 2, 1, *two]
    assert tiny_tokenizer.encode_prompt("one sea</s> two") == [1, *one, 2, *two]
    assert tiny_tokenizer.encode_prompt("") == [1]
    assert tiny_tokenizer.encode_prompt("", add_special_tokens=False) == []


def test_token_strings_and_bytes(tiny_tokenizer: Tokenizer) -> None:
    t = tiny_tokenizer
    [engine] = [i for i in range(400) if t.token_string(i) == " engine"]
    assert t.vocabulary.piece_bytes(engine) == b" engine"
    assert t.vocabulary.piece_bytes(engine, first=True) == b"engine"
    byte = 3 + 0xE4
    assert (t.token_string(byte), t.vocabulary.piece_bytes(byte), t.vocabulary.piece_bytes(byte, first=True)) == (
        "bytes:\\xe4",
        b"\xe4",
        b"\xe4",
    )
    assert [t.token_string(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [t.vocabulary.piece_bytes(i) for i in (1, 2)] == [None, None]
    assert t.vocabulary.piece_bytes(0) == t.vocabulary.piece_bytes(0, first=True) == t.decode([0]).encode()


def test_joined_token_bytes_are_the_text(tiny_tokenizer: Tokenizer) -> None:
    for text in ("the engine, 128 Fragen?", " two  spaces ", "schläft 你好 😀", ""):
        ids = tiny_tokenizer.encode(text)
        parts = [tiny_tokenizer.vocabulary.piece_bytes(token_id, first=i == 0) or b"" for i, token_id in enumerate(ids)]
        assert b"".join(parts).decode() == text


@pytest.mark.parametrize("text", ["\ud800", "fine until \udfff here", "\ud83d\ude00"])
def test_lone_surrogates_are_refused(tiny_tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
        tiny_tokenizer.encode(text, field="prompt[3]")
    assert caught.value.field == "prompt[3]"
    with pytest.raises(InvalidRequest, match=f"character {text.index(caught.value.value) + 3};"):
        tiny_tokenizer.encode_prompt("<s>" + text)


def test_text_that_cannot_fit_is_refused_before_tokenizing(tiny_tokenizer: Tokenizer) -> None:
    longest = tiny_tokenizer.max_piece_chars
    tiny_tokenizer.encode_prompt("a" * 10 * longest, max_tokens=10)  # it will not fit either, but only its ids can tell
    with pytest.raises(ContextLengthExceeded) as caught:
        tiny_tokenizer.encode_prompt("a" * 10 * longest + "a", max_tokens=10)
    assert (caught.value.value, caught.value.limit_tokens) == (11, 10)


@pytest.mark.parametrize("ids", [[400], [-1], [5, 10**12], [1.5]])
def test_ids_outside_the_vocabulary_are_refused(tiny_tokenizer: Tokenizer, ids: list) -> None:
    with pytest.raises(InvalidRequest, match=r"0\.\.399"):
        tiny_tokenizer.decode(ids)


def test_decode_of_nothing(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.decode([]) == ""
    assert tiny_tokenizer.decode([1, 2]) == ""


def test_many_threads_share_one_tokenizer(tiny_tokenizer: Tokenizer) -> None:
    texts = [f"guest {i} asked {i * i} questions by the sea" for i in range(200)]
    expected = [tiny_tokenizer.encode_prompt(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tiny_tokenizer.encode_prompt, texts)) == expected
        assert list(pool.map(tiny_tokenizer.decode, expected)) == texts


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\0" * 64, b"{}"], ids=repr)
def test_bad_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)


def test_folder_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer(tmp_path)


MUTATE = """
import random, sys
from llama.errors import TokenizerError
from llama.tokenizer import Tokenizer
source, target = sys.argv[1:]
good, rng = open(source, "rb").read(), random.Random(5)
refused = 0
for _ in range(2000):
    bad = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 4))):
        bad[rng.randrange(len(bad))] = rng.randrange(256)
    if rng.random() < 0.2:
        del bad[rng.randrange(len(bad)):]
    open(target, "wb").write(bad)
    try:
        tokenizer = Tokenizer(target)
    except TokenizerError:
        refused += 1
        continue
    tokenizer.decode(tokenizer.encode("the engine 128 \\u4f60"))
print(refused)
"""


def test_broken_models_raise_only_tokenizer_errors(tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    """In a process of its own: a fault in the native code must not take the test run with it."""
    command = [sys.executable, "-c", MUTATE, str(tiny_tokenizer_file), str(tmp_path / "mutated.model")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 100 < int(done.stdout) < 1900, "neither all harmless nor all broken"
