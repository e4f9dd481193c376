"""Stand-ins for a GPU, on the CPU: arrays that count what leaves them, and graphs that are recorded and replayed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from handlers.runtimes import Array, Engine
from handlers.runtimes.device import DeviceArray


class Resident(DeviceArray):
    """A device array that keeps a list of the shapes that were fetched."""

    def __init__(self, tensor: torch.Tensor, fetched: list[tuple[int, ...]]) -> None:
        super().__init__(tensor)
        self.fetched = fetched

    def __getitem__(self, rows: Any) -> "Resident":
        return Resident(self.tensor[rows], self.fetched)

    def followed_by(self, others: Sequence[DeviceArray]) -> "Resident":
        return Resident(super().followed_by(others).tensor, self.fetched)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        self.fetched.append(self.shape)
        return super().__array__(dtype, copy)


class OnDevice:
    """An engine whose outputs stay on a device, and which takes what is there without fetching it."""

    def __init__(self, engine: Engine, fetched: list[tuple[int, ...]]) -> None:
        self.engine, self.fetched = engine, fetched

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: a.tensor.numpy() if isinstance(a, DeviceArray) else a for name, a in inputs.items()}
        outputs = self.engine.run(feeds)
        return {name: Resident(torch.from_numpy(np.array(a)), self.fetched) for name, a in outputs.items()}

    def close(self) -> None:
        self.engine.close()


class Graph(TorchDispatchMode):
    """Records operators with the memory they work on; a replay runs them again on that memory, as a CUDA graph does.

    Only ``made`` graphs count: how many there are tells how often something was recorded.
    """

    made: ClassVar[list["Graph"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made.append(self)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():  # kernels know no gradients, though they may compute some
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(_tensors(result), _tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _tensors(result: Any) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple | list) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def record_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let what would be recorded on a GPU be recorded by `Graph`."""

    @contextmanager
    def graph(recorder: Graph, **_: object) -> Iterator[None]:
        with recorder:
            yield

    patch.setattr(Graph, "made", [])
    for name, stand_in in {
        "CUDAGraph": Graph,
        "Stream": _Stream,
        "current_stream": _Stream,
        "device": nullcontext,
        "graph": graph,
        "graph_pool_handle": object,
        "stream": nullcontext,
    }.items():
        patch.setattr(torch.cuda, name, stand_in)
