"""ONNX Runtime on an NVIDIA GPU, with the CPU for operators that CUDA lacks."""

from pathlib import Path

import onnxruntime as ort  # type: ignore[import-untyped]

from handlers.runtimes import Options, RuntimeMissing
from handlers.runtimes.onnxruntime import OnnxRuntimeEngine
from handlers.runtimes.onnxruntime import load as load_session

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def load(file: Path, options: Options) -> OnnxRuntimeEngine:
    """A session on ``file`` that really uses the GPU.

    Raises:
        RuntimeMissing: this ONNX Runtime has no CUDA, or finds no GPU it can use.
        EngineError: ONNX Runtime refuses the file.
    """
    if _CUDA not in ort.get_available_providers():
        raise RuntimeMissing("this onnxruntime is built without CUDA: pip install onnxruntime-gpu")
    engine = load_session(file, options, ((_CUDA, {"device_id": options.device}), _CPU))
    if _CUDA not in engine.providers:  # ONNX Runtime falls back to the CPU with a mere warning
        raise RuntimeMissing("onnxruntime cannot use the GPU: check the driver, CUDA and cuDNN (mlvgm doctor)")
    return engine
