"""What people import: the names, the cost of importing, the spelling of 2023, several models, and the small calls."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import api.error
import pytest
from api_cases import MESSAGES, PROMPT, error_of, write_model

import api
import api.legacy
from llama.config import Limits
from llama.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer_file)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[api.Client]:
    with api.Client(folder) as client:
        yield client


@pytest.fixture
def no_default() -> Iterator[None]:
    api.shutdown()
    yield
    api.shutdown()


# --- importing -----------------------------------------------------------------------------------------------------


def test_exported_names() -> None:
    assert set(api.__all__) == {
        *("Client", "AsyncClient", "ChatCompletion", "Completion", "Model", "init", "shutdown", "error", "errors"),
        *("OpenAIError", "APIError", "APIStatusError", "APIConnectionError", "APITimeoutError", "InvalidRequestError"),
        *("BadRequestError", "NotFoundError", "AuthenticationError", "PermissionDeniedError", "RateLimitError"),
        *("InternalServerError", "ServiceUnavailableError"),
    }
    assert all(hasattr(api, name) for name in api.__all__)


def test_import_is_quick_and_loads_no_torch() -> None:
    clock = "time.process_time()"  # other processes may be at work on this machine
    code = f"import sys, time; t = {clock}; import api; print({clock} - t, 'torch' in sys.modules)"
    results = []
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        results.append(out.split())
    assert {loaded for _, loaded in results} == {"False"}
    assert min(float(seconds) for seconds, _ in results) < 0.5


def test_an_embedding_program_loads_nothing_of_the_server() -> None:
    code = "import sys, api; print({name.partition('.')[0] for name in sys.modules} | set(sys.modules))"
    loaded = eval(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)
    assert "api.client" in loaded
    assert not {"api.http", "starlette", "uvicorn", "h11", "prometheus_client"} & loaded


def test_no_global_state_but_the_default_client() -> None:
    modules = [module for name, module in sys.modules.items() if name == "api" or name.startswith("api.")]
    constants = {
        "api.arguments.RANGES",
        "api.arguments.TABLE",
        "api.request.TABLE",
        "api.http.app.PATHS",
        "api.http.middleware.ENDPOINTS",
        "api.http.middleware.OPEN",
        "api.http.openapi.ERROR",
        "api.http.openapi.PATHS",
        "api.http.openapi.REFUSALS",
        "api.http.openapi.TABLE",
        "api.http.openapi.TEXT",
        "api.http.openapi.TEXT_OR_NULL",
        "api.http.playground.FILES",
        "api.http.playground.HEADERS",
        "api.http.playground.KINDS",
        "api.http.uvicorn_server.REFUSALS",
    }
    mutable = {
        f"{module.__name__}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, (list, dict, set)) and not name.startswith("__")
    }
    assert mutable <= constants
    rebound = [module.__name__ for module in modules if "    global " in inspect.getsource(module)]
    assert rebound == ["api.legacy"]


def test_another_llama_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "llama.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(ROOT)!r}); import api"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ImportError" in done.stderr and "llama.py" in done.stderr


def test_error_names_of_2023() -> None:
    assert importlib.import_module("api.error") is api.error
    assert api.error.Timeout is api.APITimeoutError
    assert api.error.PermissionError is api.PermissionDeniedError
    assert issubclass(api.BadRequestError, api.error.InvalidRequestError)
    assert issubclass(api.NotFoundError, api.error.InvalidRequestError)
    assert issubclass(api.ServiceUnavailableError, api.InternalServerError)
    for name in api.error.__all__:
        assert issubclass(getattr(api.error, name), api.OpenAIError)
    statuses = {
        api.BadRequestError: 400,
        api.AuthenticationError: 401,
        api.PermissionDeniedError: 403,
        api.NotFoundError: 404,
        api.RateLimitError: 429,
        api.InternalServerError: 500,
        api.ServiceUnavailableError: 503,
    }
    for kind, status in statuses.items():
        error = kind("No.")
        assert (error.status_code, error.http_status, str(error)) == (status, status, "No.")
        assert error.to_dict() == {"error": error.body}
        assert error.body.keys() == {"message", "type", "param", "code"}
    assert not issubclass(api.APITimeoutError, api.APIStatusError)


# --- clients -------------------------------------------------------------------------------------------------------


def test_options_are_checked(folder: Path) -> None:
    with pytest.raises(TypeError, match="blok_size"):
        api.Client(folder, blok_size=16)
    with pytest.raises(ConfigError):
        api.Client(folder, slots=0)
    with pytest.raises(ConfigError):
        api.Client(folder / "nothing")
    with pytest.raises(ValueError, match="compat"):
        api.Client(folder, compat="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="special_tags"):
        api.Client(folder, special_tags="other")  # type: ignore[arg-type]


def test_limits_reach_the_engine(folder: Path) -> None:
    limits = Limits(n=2, stop=1)
    with api.Client(folder, limits=limits) as client:
        assert client.served.find().engine.limits is limits
        assert client.completions.create(prompt=PROMPT, n=2, max_tokens=1).choices[1].index == 1
        assert error_of(client.completions.create, prompt=PROMPT, n=3).message == "'n' is 3: must be from 1 to 2."
        assert error_of(client.completions.create, prompt=PROMPT, stop=["a", "b"]).param == "stop"


def test_client_wide_strictness_tags_and_base_models(folder: Path) -> None:
    with api.Client(folder, strict=True, special_tags="text", chat=False) as strict:
        assert error_of(strict.completions.create, prompt=PROMPT, user="me").code == "unknown_parameter"
        error = error_of(strict.chat.completions.create, messages=MESSAGES)
        assert (error.status_code, error.code) == (404, "not_a_chat_model")
    with api.Client(folder, special_tags="text") as lenient:
        tagged = [{"role": "user", "content": "[INST]"}]
        assert lenient.chat.completions.create(messages=tagged, max_tokens=1).choices


def test_several_models_by_name(folder: Path, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    other = write_model(tmp_path / "other", tiny_tokenizer_file, context=64)
    with api.Client(folder, slots=2) as client:
        assert client.load(other, served_name="second", aliases=["b"], slots=1).id == "second"
        with pytest.raises(ValueError, match="'b'"):
            client.load(folder, served_name="b")
        assert [model.id for model in client.models.list()] == ["tiny", "second"]
        assert client.models.list().data[1].max_model_len == 64
        assert client.completions.create(prompt=PROMPT).model == "tiny"
        assert client.completions.create(prompt=PROMPT, model="b").model == "second"
        assert client.completions.create(prompt=PROMPT, model=str(folder)).model == "tiny"
        stream = client.completions.create(prompt=PROMPT, model="second", stream=True, max_tokens=30, ignore_eos=True)
        assert client.stats("second").slots == 1
        assert client.stats().slots_in_use == 0, "each has its own slots"
        stream.close()
        assert error_of(client.models.retrieve, "third").code == "model_not_found"


def test_several_clients(folder: Path) -> None:
    with api.Client(folder, served_name="a") as a, api.Client(folder, served_name="b") as b:
        fields = {"prompt": PROMPT, "seed": 1, "max_tokens": 8}
        first, second = a.completions.create(**fields), b.completions.create(**fields)
        assert (first.model, second.model) == ("a", "b")
        assert first.choices[0].text == second.choices[0].text
        assert first.system_fingerprint == second.system_fingerprint


def test_async_client(folder: Path) -> None:
    async def main() -> None:
        async with api.AsyncClient(folder) as client:
            answer = await client.chat.completions.create(messages=MESSAGES, max_tokens=4)
            assert answer.object == "chat.completion"
            stream = await client.completions.create(prompt=PROMPT, max_tokens=4, stream=True)
            assert {chunk.object async for chunk in stream} == {"text_completion"}
            assert stream.usage is not None
            assert (await client.models.list()).data[0].id == "tiny"
            assert (await client.models.retrieve("tiny")).id == "tiny"
            tokens = await client.tokenize(PROMPT)
            assert (await client.detokenize(tokens.tokens)).prompt == PROMPT
            assert client.health().status == "ok"
            assert client.stats().slots == 30
            with pytest.raises(api.BadRequestError):
                await client.completions.create(prompt=[])

    asyncio.run(main())


def test_tokenize(client: api.Client) -> None:
    told = client.tokenize("<s>the path", return_token_strs=True)
    assert told.tokens[0] == 1
    assert (told.count, told.max_model_len) == (len(told.tokens), 256)
    assert told.token_strs is not None and told.token_strs[0] == "<s>"
    assert "".join(told.token_strs[1:]) == " the path"
    assert client.tokenize("the path").tokens == told.tokens
    assert client.tokenize("the path", add_special_tokens=False).tokens == told.tokens[1:]
    assert client.tokenize("<s>", parse_special=False).count > 2
    assert client.detokenize(told.tokens).prompt == "the path"
    chat = client.chat.completions.create(messages=MESSAGES, max_tokens=1)
    assert client.tokenize(messages=MESSAGES).count == chat.usage.prompt_tokens
    assert "token_strs" not in client.tokenize("x")
    for bad in (
        {"prompt": None},
        {"prompt": "x", "messages": MESSAGES},
        {"prompt": 5},
        {"prompt": "\ud800"},
        {"messages": []},
    ):
        assert error_of(client.tokenize, **bad).status_code == 400
    for ids in ("x", [400], [-1], [True], [1 << 70], ["1"], None):
        assert error_of(client.detokenize, ids).param == "tokens"


def test_models_and_health(client: api.Client) -> None:
    model = client.models.retrieve("tiny").to_dict()
    assert model.keys() == {"id", "object", "created", "owned_by", "max_model_len"}
    assert client.models.list().to_dict() == {"object": "list", "data": [model]}
    assert client.health().to_dict().keys() == {"status", "heartbeat_age", "slots", "slots_in_use"}
    assert client.health().status == "ok"


# --- 2023 ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_default")
def test_the_spelling_of_2023(folder: Path) -> None:
    answer = api.ChatCompletion.create(
        model=str(folder), messages=MESSAGES, max_tokens=4, api_key="x", request_timeout=60
    )
    assert answer["choices"][0]["message"]["content"] == answer.choices[0].message.content
    assert answer.ignored_parameters == ["api_key"]
    text = "".join(
        chunk["choices"][0]["delta"].get("content", "")
        for chunk in api.ChatCompletion.create(engine="tiny", messages=MESSAGES, stream=True, max_tokens=4)
    )
    assert isinstance(text, str)
    assert api.Completion.create(engine="tiny", prompt=PROMPT, max_tokens=2)["usage"]["completion_tokens"] <= 2
    assert error_of(api.Completion.create, model="another", prompt=PROMPT).code == "model_not_found"
    assert api.Model.list()["data"][0]["id"] == api.Model.retrieve("tiny")["id"] == "tiny"

    async def main() -> None:
        assert (await api.ChatCompletion.acreate(messages=MESSAGES, max_tokens=1)).choices
        stream = await api.Completion.acreate(prompt=PROMPT, max_tokens=2, stream=True)
        assert [chunk async for chunk in stream]

    asyncio.run(main())


@pytest.mark.usefixtures("no_default")
def test_init(folder: Path) -> None:
    first = api.init(folder, slots=1, served_name="mine")
    assert api.Completion.create(prompt=PROMPT, max_tokens=1).model == "mine"
    second = api.init(folder)
    assert second is not first
    assert first.health().status == "stopped", "an earlier default client is closed"
    assert api.Completion.create(prompt=PROMPT, max_tokens=1).model == "tiny"


@pytest.mark.usefixtures("no_default")
def test_a_model_that_is_nowhere() -> None:
    error = error_of(api.ChatCompletion.create, model="gpt-4", messages=MESSAGES)
    assert (error.status_code, error.code, error.param) == (404, "model_not_found", "model")


@pytest.mark.usefixtures("no_default")
def test_the_first_calls_of_many_threads_load_one_model(folder: Path) -> None:
    async def main() -> list[str]:
        calls = [
            asyncio.to_thread(api.Completion.create, model=str(folder), prompt=PROMPT, max_tokens=1) for _ in range(8)
        ]
        return [answer.model for answer in await asyncio.gather(*calls)]

    started = time.monotonic()
    assert asyncio.run(main()) == ["tiny"] * 8
    assert time.monotonic() - started < 20
