"""ONNX Runtime on an NVIDIA GPU, and on the CPU for operators without a CUDA kernel (docs/gpu.md: what has been run).

With a CUDA build of PyTorch, which then holds the memory, outputs stay on the GPU between stages; without one, they are
copied to the host after every stage.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from handlers.runtimes import Array, Engine, EngineOptions, RuntimeMissing, engine_errors
from handlers.runtimes.device import DeviceArray
from handlers.runtimes.onnxruntime import OnnxRuntimeEngine, session_of

if TYPE_CHECKING:
    import torch

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def load(file: Path, options: EngineOptions) -> Engine:
    """An engine of the graph ``file`` on the GPU.

    Raises:
        RuntimeMissing: this ONNX Runtime is built without CUDA, or cannot use the GPU.
        EngineError: ONNX Runtime refuses the file.
    """
    if _CUDA not in ort.get_available_providers():
        raise RuntimeMissing("this onnxruntime is built without CUDA: pip install onnxruntime-gpu")
    # TF32 has a mantissa of ten bits: too imprecise for fp32 graphs, and for the fp32 regions of fp16 graphs.
    session = session_of(file, options, [(_CUDA, {"device_id": options.device, "use_tf32": 0}), _CPU])
    if _CUDA not in session.get_providers():  # ONNX Runtime falls back to the CPU with a warning only
        raise RuntimeMissing("onnxruntime cannot use the GPU: check the driver, CUDA and cuDNN (mlvgm doctor)")
    device = _torch_device(options.device)
    return BoundEngine(session, device) if device else OnnxRuntimeEngine(session)


def _torch_device(number: int) -> "torch.device | None":
    try:
        import torch
    except ImportError:
        return None
    return torch.device("cuda", number) if torch.cuda.is_available() else None


class BoundEngine:
    """An engine of one session whose inputs and outputs are tensors of PyTorch on ``device``."""

    def __init__(self, session: Any, device: "torch.device") -> None:
        self._session, self._device = session, device
        self._batched = {tensor.name for tensor in session.get_inputs() if not isinstance(tensor.shape[0], int)}
        self._rows_of = {tensor.name: tuple(tensor.shape[1:]) for tensor in session.get_outputs()}

    @engine_errors("ONNX Runtime")
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        given = {name: self._to_device(array) for name, array in inputs.items()}
        rows = next(len(tensor) for name, tensor in given.items() if name in self._batched)
        outputs = {name: torch.empty((rows, *shape), device=self._device) for name, shape in self._rows_of.items()}
        binding = self._session.io_binding()
        for bind, tensors in ((binding.bind_input, given), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                place = (self._device.type, self._device.index or 0)
                bind(name, *place, np.float32, tuple(tensor.shape), tensor.data_ptr())
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # ONNX Runtime has a stream of its own
        self._session.run_with_iobinding(binding)  # returns when its stream is done
        return {name: DeviceArray(tensor) for name, tensor in outputs.items()}

    def close(self) -> None:
        self._session = None

    def _to_device(self, array: Array) -> "torch.Tensor":
        import torch

        if isinstance(array, DeviceArray):
            return array.tensor.contiguous()
        return torch.tensor(array, dtype=torch.float32, device=self._device)
