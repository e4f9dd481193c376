"""CUDA graphs: the kernels of a computation, recorded once for each number of rows and from then on started as one.

Python starts kernels one by one, and for small layers more slowly than a GPU runs them. A recorded graph works on the
memory that it was recorded with: inputs are copied into it, and outputs out of it.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from handlers.runtimes import Array, EngineError
from handlers.runtimes.device import DeviceArray

Tensors = dict[str, Tensor]

_RECORDING = threading.Lock()
_WARM_UPS = 2  # runs before recording, in which libraries choose their kernels and set aside memory


class Computation(Protocol):
    """One computation on memory that stays what it is."""

    def start(self) -> Tensors:
        """Start its kernels on the current stream; the outputs, which are read before it is started again."""

    def may_record(self) -> bool:
        """Whether its kernels, once they have run, may be recorded; where not, they are started one by one."""


@dataclass(frozen=True)
class _Recorded:
    inputs: Tensors
    replay: Callable[[], Tensors]
    computation: Computation  # kept: a recorded graph works on its memory


class CudaGraphs:
    """Runs a computation on one device; not for several threads at a time.

    Args:
        prepare: takes inputs, whose memory stays what it is, and gives the computation on them.
        device: where inputs go and outputs stay.
        owner: is kept alive as long as the computations are.
    """

    def __init__(self, prepare: Callable[[Tensors], Computation], device: torch.device, owner: object = None) -> None:
        self._prepare: Callable[[Tensors], Computation] | None = prepare
        self._device, self._owner = device, owner
        self._recorded: dict[tuple[tuple[str, tuple[int, ...]], ...], _Recorded] = {}
        with torch.cuda.device(device):
            # Shared by all sizes: one graph runs at a time, and its outputs are copied before the next.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for ``inputs``, which may be on the host or the device.

        Raises:
            EngineError: the computation fails, or the GPU's memory is too small for this size.
        """
        try:
            before = torch.cuda.current_stream(self._device)
            with torch.no_grad(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._stream.wait_stream(before)  # where rows of device arrays are cut
                given = {name: _tensor(array) for name, array in inputs.items()}
                key = tuple((name, tuple(tensor.shape)) for name, tensor in given.items())
                if key not in self._recorded:
                    self._recorded[key] = self._record(given)
                recorded = self._recorded[key]
                for name, tensor in given.items():
                    recorded.inputs[name].copy_(tensor)
                outputs = {name: DeviceArray(tensor.clone()) for name, tensor in recorded.replay().items()}
                self._stream.synchronize()  # a stage's time is its own, and so are its errors
                return outputs
        except EngineError:
            raise
        except Exception as error:  # programs check their inputs with assertions and value errors, too
            raise EngineError(f"PyTorch: {error}") from error

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
        if not computation.may_record():
            return _Recorded(inputs, computation.start, computation)
        graph = torch.cuda.CUDAGraph()
        # One recording at a time; and what other threads do to the device meanwhile, such as taking memory, is theirs.
        with (
            _RECORDING,
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            outputs = computation.start()

        def replay() -> Tensors:
            graph.replay()
            return outputs

        return _Recorded(inputs, replay, computation)


def _tensor(array: Array) -> Tensor:
    if isinstance(array, DeviceArray):
        return array.tensor
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))
