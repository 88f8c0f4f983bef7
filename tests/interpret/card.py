"""A CUDA card that is not there, for the engine's own code: pinned memory, events and graphs.

Tensors "on" it are of device cuda:0, and their numbers lie in ordinary memory. Nothing that is asked of the card is
done before somebody waits for it, which is as late as a card may be: a result that is read too early is poison, and a
pinned buffer that is written again too early is seen with its new contents. While a graph is captured nothing is done
at all, and waiting is an error; what graphs compute is spoilt when another one is replayed, since they share memory.
Triton's kernels run in the interpreter, in their turn. Not seen: work on two streams at once, and memory that a graph
reads although it was given back.

    with Card() as card:
        x = torch.zeros(3, device="cuda")       # queued
        y = x.cpu()                             # waits for all of it; card.stalls counts
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

DEVICE = torch.device("cuda", 0)
MEMORY = 1 << 30
TO_COPY, COPY_INTO = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
FOR_THE_HOST = torch.ops.aten._local_scalar_dense.default
Work = Callable[[], object]


class CardTensor(Tensor):
    """On the card; `memory` is where its numbers lie."""

    memory: Tensor

    @staticmethod
    def __new__(cls, memory: Tensor) -> CardTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device="meta",  # to torch's own C++, which has no guard for cards where it was built without CUDA
        )
        made.memory = memory
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the card's context")


def memory_of(value: Any) -> Any:
    return value.memory if isinstance(value, CardTensor) else value


@dataclass
class Event:
    """As torch.cuda.Event: `synchronize` waits for what was queued before it was recorded."""

    card: Card
    place: int = 0

    def record(self) -> None:
        self.card.refuse_in_capture("an event of the host")
        self.place = self.card.n_queued

    def synchronize(self) -> None:
        self.card.wait(self.place)


@dataclass
class Graph:
    """As torch.cuda.CUDAGraph. memory: of what it computes."""

    card: Card
    work: list[Work] = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)

    def replay(self) -> None:
        self.card.n_replays += 1
        for other in self.card.graphs:
            if other is not self:
                self.card.put(other.spoil)
        for one in self.work:
            self.card.put(one)

    def spoil(self) -> None:
        for tensor in self.memory:
            tensor.copy_(poison(tensor))


class Operations(TorchDispatchMode):
    """Hands every operation of torch to the card."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.card.operate(func, args, dict(kwargs or {}))


class Card:
    """Use as a context; torch.cuda answers as if it were there.

    pace: how far the card gets by itself each time that it is given something; None: nowhere.
    stalls: how often the host waited for all that was given to the card, as plain copies and `item` do.
    uploads, fetches: copies to it and from it for which nobody waited. launches: Triton kernels.
    """

    def __init__(self, pace: random.Random | None = None) -> None:
        self.pace = pace
        self.stalls = self.uploads = self.fetches = self.launches = self.n_replays = 0
        self.n_done = self.n_queued = 0
        self._queue: list[Work] = []
        self.graphs: list[Graph] = []
        self._capturing: Graph | None = None
        self._pinned: list[Tensor] = []

    # The queue

    def put(self, work: Work) -> None:
        if self._capturing is not None:
            self._capturing.work.append(work)
        else:
            self._queue.append(work)
            self.n_queued += 1
            if self.pace is not None:
                self._do(self.n_done + self.pace.choice((0, 0, 1, 2, 3)))

    def stall(self) -> None:
        """Wait for everything."""
        self.stalls += 1
        self.wait(self.n_queued)

    def wait(self, place: int) -> None:
        """Until so many of the works that were ever queued are done."""
        self.refuse_in_capture("waiting for the card")
        self._do(place)

    def _do(self, place: int) -> None:
        place = min(place, self.n_queued)
        with torch.inference_mode():  # whoever waits
            while self.n_done < place:
                self._queue.pop(0)()
                self.n_done += 1

    def refuse_in_capture(self, what: str) -> None:
        if self._capturing is not None:
            raise RuntimeError(f"{what} while a graph is captured")

    # Tensors

    def operate(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation of torch, on whatever device."""
        on_card = any(isinstance(value, CardTensor) for value in tree_leaves((args, kwargs)))
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if kwargs.pop("pin_memory", False):
            made = func(*args, **kwargs)
            if "empty" in func.name():
                made.copy_(poison(made))
            self._pinned.append(made)
            return made
        if func in (TO_COPY, COPY_INTO):
            return self._copy(func, device, args, kwargs)
        if not on_card and (device is None or device.type == "cpu"):
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with Operations(self):
                return func.decompose(*args, **kwargs)
        return self._compute(func, args, kwargs)

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if strangers := [t for t in tree_leaves((args, kwargs)) if type(t) is Tensor and t.dim()]:
            raise RuntimeError(f"{func}: all tensors must be on the card, one is on {strangers[0].device}")
        args_here, kwargs_here = tree_map(memory_of, (args, kwargs))
        made_of = {} if kwargs.get("device") is None else {"device": "cpu"}

        def run() -> Any:
            return func(*args_here, **kwargs_here | made_of)

        returns = func._schema.returns
        if all(one.alias_info is not None and not one.alias_info.is_write for one in returns):
            return tree_map(CardTensor, run())  # a view: nothing is read
        if func._schema.is_mutable:
            self.put(run)
            return args[0]
        if func is FOR_THE_HOST:
            self.stall()
            return run()
        args_there, kwargs_there = tree_map(to_meta, (args_here, kwargs_here))
        made = poison(func(*args_there, **kwargs_there | dict.fromkeys(made_of, "meta")))
        if "empty" not in func.name():
            self.put(lambda: made.copy_(run()))
        if self._capturing is not None:
            self._capturing.memory.append(made)
        return CardTensor(made)

    def _copy(self, func: Any, device: torch.device | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copies between the host and the card, and on the card."""
        in_place = func is COPY_INTO
        source = args[1] if in_place else args[0]
        if in_place:
            target = args[0]
        else:
            made = poison(memory_of(source), kwargs.get("dtype"))
            target = made if (device or source.device).type == "cpu" else CardTensor(made)
        to, of = memory_of(target), memory_of(source)
        on_host = [tensor for tensor in (target, source) if tensor.device.type == "cpu"]
        if len(on_host) == 1:
            asked = kwargs.get("non_blocking", False) or (in_place and len(args) > 2 and args[2])
            if not asked or not self._is_pinned(on_host[0]):
                self.stall()
                to.copy_(of)
                return target
            self.uploads += on_host[0] is source
            self.fetches += on_host[0] is target
        if len(on_host) == 2:
            to.copy_(of)
        else:
            self.put(lambda: to.copy_(of))
        return target

    def _is_pinned(self, tensor: Tensor) -> bool:
        at = tensor.untyped_storage().data_ptr()
        return any(one.untyped_storage().data_ptr() == at for one in self._pinned)

    # torch.cuda and Triton

    def __enter__(self) -> Card:
        self._stack = contextlib.ExitStack()
        answers: dict[str, Any] = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "set_device": lambda device: None,
            "mem_get_info": lambda device=None: (MEMORY, MEMORY),
            "empty_cache": lambda: None,
            "Event": lambda: Event(self),
            "Stream": mock.Mock,
            "current_stream": mock.Mock,
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": lambda: Graph(self),
            "graph_pool_handle": mock.Mock,
            "graph": self._capture,
        }
        for name, answer in answers.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        run = InterpretedFunction.run

        def launch(function: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
            self.launches += self._capturing is None
            args = tuple(descriptor(arg) if isinstance(arg, TensorDescriptor) else memory_of(arg) for arg in args)
            self.put(lambda: run(function, *args, **kwargs))

        self._stack.enter_context(mock.patch.object(InterpretedFunction, "run", launch))
        self._stack.enter_context(Operations(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _capture(self, graph: Graph, **_: Any) -> Iterator[None]:
        self.stall()
        self.graphs.append(graph)
        self._capturing = graph
        try:
            yield
        finally:
            self._capturing = None


def to_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def poison(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a tensor like that, full of NaN or the worst integers."""
    dtype = dtype or like.dtype
    worst = float("nan") if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max // 2
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype).fill_(worst)


def descriptor(given: TensorDescriptor) -> TensorDescriptor:
    return TensorDescriptor(memory_of(given.base), given.shape, given.strides, given.block_shape)
