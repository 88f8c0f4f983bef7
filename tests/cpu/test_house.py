"""What a reader goes through: the modules of a chat request, the frames above an operation, two functions' size."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import api
import kernels
from llama.loop import EngineLoop
from llama.runner import Runner

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "llama", "api")


def module_of(frame: FrameType) -> str | None:
    """Dotted name of the project's module whose lines the frame runs; code that dataclasses make has no lines."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT):
        return None
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.split(".")[0] in PACKAGES else None


class Profile:
    """The project's modules that were entered, and for each operation of `kernels` the calls from `step` down to it."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.operations: dict[str, list[str]] = {}

    def note(self, frame: FrameType, event: str, arg: Any) -> None:
        if event != "call" or (module := module_of(frame)) is None:
            return
        self.modules.add(module)
        if module == "kernels" and frame.f_code.co_name in kernels.__all__:
            calls = [frame.f_code.co_qualname]
            caller = frame.f_back
            while caller is not None and calls[0] != "EngineLoop.step":
                calls = [caller.f_code.co_qualname, *calls] if module_of(caller) else calls
                caller = caller.f_back
            self.operations[calls[-1]] = max(self.operations.get(calls[-1], []), calls, key=len)


@pytest.fixture(scope="module")
def profile() -> Profile:
    """Of one chat request, from `create` to the answer, in the caller's thread and in the engine's."""
    found = Profile()
    with pytest.MonkeyPatch.context() as patch, api.Client(model="demo") as client:
        take: Callable[[EngineLoop], bool] = EngineLoop._take_messages

        def watched(loop: EngineLoop) -> bool:
            sys.setprofile(found.note)
            return take(loop)

        patch.setattr(EngineLoop, "_take_messages", watched)
        for _ in range(2):  # the engine thread is watched from the end of the first one on
            found.modules.clear()
            found.operations.clear()
            sys.setprofile(found.note)
            try:
                client.chat.completions.create(
                    messages=[{"role": "user", "content": "What is a slot?"}], temperature=0, max_tokens=8
                )
            finally:
                sys.setprofile(None)
    return found


def test_a_chat_request_touches_few_modules(profile: Profile) -> None:
    touched = sorted(profile.modules)
    assert {"llama.loop", "llama.scheduler", "llama.model"} <= profile.modules, "the engine thread was not watched"
    assert len(touched) <= 24, touched


def test_an_operation_is_at_most_seven_frames_below_the_step(profile: Profile) -> None:
    deepest = max(profile.operations.values(), key=len)
    assert deepest[0] == "EngineLoop.step" and "paged_attention" in profile.operations
    assert len(deepest) <= 7, deepest


@pytest.mark.parametrize("function", [EngineLoop.step, Runner.launch], ids=lambda f: f.__qualname__)
def test_the_two_functions_to_begin_with_fit_a_screen(function: Callable[..., Any]) -> None:
    assert len(inspect.getsource(function).splitlines()) < 25
