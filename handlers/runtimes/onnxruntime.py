"""ONNX Runtime on the CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from handlers import cores
from handlers.runtimes import Array, EngineOptions, engine_errors, memory


def load(file: Path, options: EngineOptions) -> "OnnxRuntimeEngine":
    """An engine of the graph ``file``; external data is loaded from its folder.

    Raises:
        EngineError: ONNX Runtime refuses the file.
    """
    return OnnxRuntimeEngine(session_of(file, options, ["CPUExecutionProvider"]))


def session_of(file: Path, options: EngineOptions, providers: Sequence[Any]) -> Any:
    """A session of ``file``, in which each operator runs on the first of ``providers`` that supports it.

    Raises:
        EngineError: ONNX Runtime refuses the file.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads or cores.granted() or 0
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    # Spinning threads would take cores from the next stage and from other workers: twice the CPU time.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Its plan of the memory for a batch size comes beside what the first run took: 10.3 instead of 6.3 GB at 1024 px.
    settings.enable_mem_pattern = False
    if memory.of_weights(file) > memory.LARGE_BYTES:
        memory.return_freed()
    with engine_errors(f"{file}: ONNX Runtime cannot load it"):
        return ort.InferenceSession(str(file), settings, providers=list(providers))


class OnnxRuntimeEngine:
    """An engine of one session; inputs and outputs are numpy arrays."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    @engine_errors("ONNX Runtime")
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))

    def close(self) -> None:
        self._session = None
