"""OpenVINO on the CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-untyped]

from handlers.runtimes import Array, EngineError, Options


def load(file: Path, options: Options) -> "OpenVinoEngine":
    """A compiled model of ``file`` (ONNX); external data is found beside it.

    Raises:
        EngineError: OpenVINO refuses the file.
    """
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        # A thread pinned to a core waits for whatever else runs there: with one busy neighbour, five times longer.
        "ENABLE_CPU_PINNING": False,
        # Left alone, OpenVINO computes in bf16 wherever the CPU can, and the answers drift away from the reference.
        "INFERENCE_PRECISION_HINT": "bf16" if options.precision == "bf16" else "f32",
    }
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    try:
        return OpenVinoEngine(ov.Core().compile_model(str(file), "CPU", settings))
    except RuntimeError as error:
        raise EngineError(f"{file}: OpenVINO cannot load it: {error}") from error


class OpenVinoEngine:
    """One compiled model with one request; inputs and outputs are numpy arrays."""

    def __init__(self, model: ov.CompiledModel) -> None:
        self._request = model.create_infer_request()
        self._outputs = [output.names for output in model.outputs]  # an output can go by several names

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            results = self._request.infer(feeds, share_inputs=True)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO: {error}") from error
        return {name: results[i] for i, names in enumerate(self._outputs) for name in names}

    def close(self) -> None:
        del self._request
