"""Write a stage as a program of `torch.export` for the runtime "torch": the module of its ONNX graph, made for a GPU.

Programs lie in the folder ``engines`` of a bundle. Each belongs to one graph and is not loaded for another.
"""

import dataclasses
import hashlib
import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from export.families.stylegan2 import StaticConv, shifted
from export.stage import Stage
from export.trace import program
from handlers.runtimes import engine_store, pt2
from handlers.runtimes.torch import SUFFIX, version


def write(stage: Stage, file: Path) -> Path:
    """Write the program of ``stage``, whose graph is ``file``, with its JSON file; returns its path.

    Raises:
        TraceError: the stage came as an ONNX graph, or cannot be exported.
        EngineError: the program has something else than operators, shapes and weights (`handlers.runtimes.pt2`).
    """
    made = program(for_gpu(stage))
    made.example_inputs = None  # these would be pickled
    graph = engine_store.digest(file)
    key = hashlib.sha256(f"{graph} {version()}".encode()).hexdigest()[:16]
    path = file.parent / engine_store.FOLDER / f"{file.stem}-{key}{SUFFIX}"
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights that are views of one tensor; pt2.read checks the result
        torch.export.save(made, path)
    pt2.read(path)
    info = {"graph": graph, "library": "torch", "version": version(), "targets": [engine_store.ANY]}
    names = {"inputs": [spec.name for spec in stage.inputs], "outputs": [spec.name for spec in stage.outputs]}
    engine_store.write_info(path, info | names)
    return path


def for_gpu(stage: Stage) -> Stage:
    """``stage`` with what a GPU computes faster: its blurs as sums of shifted maps."""

    def module() -> nn.Module | ir.Model:
        made = stage.module()
        for layer in made.modules() if isinstance(made, nn.Module) else ():
            if isinstance(layer, StaticConv) and layer.upsample:
                layer.smooth = shifted(layer.blur)
        return made

    return dataclasses.replace(stage, module=module)
