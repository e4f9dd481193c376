"""CUDA graphs: the kernels of a computation are recorded once per batch size, and from then on launched together.

Python launches kernels one by one, for small layers more slowly than a GPU runs them. A graph works on the memory with
which it was recorded, so inputs are copied into that memory and outputs out of it.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handlers.runtimes import Array, engine_errors
from handlers.runtimes.device import DeviceArray

Tensors = dict[str, Tensor]

_TURN = threading.Lock()
_WARM_UPS = 2  # runs before recording, in which libraries choose kernels and allocate memory


@dataclass(frozen=True)
class Computation:
    """A computation on fixed memory.

    Attributes:
        start: launches its kernels on the current stream, and returns the outputs, which the next start overwrites.
        may_record: whether its kernels may be recorded as a CUDA graph; otherwise every run calls ``start``.
    """

    start: Callable[[], Tensors]
    may_record: bool = True


@dataclass(frozen=True)
class _Recorded:
    inputs: Tensors
    replay: Callable[[], Tensors]
    computation: Computation  # kept alive: the recorded graph works on its memory


class CudaGraphs:
    """An engine that records a computation on a GPU once per batch size.

    All engines of a GPU take turns on one stream: cuBLAS keeps 32 MiB for every stream that has ever been used.

    Args:
        prepare: returns the computation on given inputs, whose memory is fixed.
        device: the GPU. Outputs stay on it.
        owner: an object to keep alive as long as the computations.
    """

    def __init__(self, prepare: Callable[[Tensors], Computation], device: torch.device, owner: object = None) -> None:
        self._prepare: Callable[[Tensors], Computation] | None = prepare
        self._device, self._owner = device, owner
        self._recorded: dict[tuple[tuple[str, tuple[int, ...]], ...], _Recorded] = {}
        self._stream = _stream(device)
        with torch.cuda.device(device):
            # One memory pool for all graphs: they run one at a time, and outputs are copied before the next run.
            self._pool = torch.cuda.graph_pool_handle()

    @engine_errors("PyTorch")
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for ``inputs``, which may be on the host or the device.

        Raises:
            EngineError: the computation fails, or the GPU has too little memory for this batch size.
        """
        before = torch.cuda.current_stream(self._device)
        with _TURN, torch.no_grad(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(before)  # in which the rows of device arrays were selected
            given = {name: _tensor(array) for name, array in inputs.items()}
            key = tuple((name, tuple(tensor.shape)) for name, tensor in given.items())
            if key not in self._recorded:
                self._recorded[key] = self._record(given)
            recorded = self._recorded[key]
            for name, tensor in given.items():
                recorded.inputs[name].copy_(tensor)
            outputs = {name: DeviceArray(tensor.clone()) for name, tensor in recorded.replay().items()}
            self._stream.synchronize()  # so that a stage's time and errors are not attributed to the next
            return outputs

    def close(self) -> None:
        self._recorded.clear()
        self._prepare = self._owner = None

    def _record(self, given: Tensors) -> _Recorded:
        inputs = {name: torch.empty(tensor.shape, device=self._device) for name, tensor in given.items()}
        for name, tensor in given.items():
            inputs[name].copy_(tensor)
        assert self._prepare is not None, "it is closed"
        computation = self._prepare(inputs)
        for _ in range(_WARM_UPS):
            computation.start()
        if not computation.may_record:
            return _Recorded(inputs, computation.start, computation)
        graph = torch.cuda.CUDAGraph()
        # "thread_local" lets other threads use the device meanwhile, to allocate for example.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = computation.start()

        def replay() -> Tensors:
            graph.replay()
            return outputs

        return _Recorded(inputs, replay, computation)


@functools.cache
def _stream(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return torch.cuda.Stream()


def _tensor(array: Array) -> Tensor:
    if isinstance(array, DeviceArray):
        return array.tensor
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))
