"""The engine calls of one run of a pipeline: they are timed, and what they return is checked against the manifest."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from handlers.arrays import IntArray
from handlers.manifest import StageSpec
from handlers.runtimes import Array, Engine, EngineError


class NonFiniteError(EngineError):
    """A stage returned NaN or infinity for some images; ``items`` are their indices in the batch."""

    def __init__(self, stage: str, items: Sequence[int]) -> None:
        self.stage, self.items = stage, list(items)
        which = ", ".join(map(str, items))
        super().__init__(f"stage {stage} gave NaN or infinite values for image {which} of the batch")


class EngineCalls:
    """Calls of a pipeline's ``engines``.

    Args:
        least: rows that the engines take at least; the first row of a smaller batch is repeated.

    Attributes:
        milliseconds: by stage, summed over the calls.
    """

    def __init__(self, engines: Mapping[str, Engine], least: int) -> None:
        self._engines, self._least = engines, least
        self.milliseconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent in this context to that of ``name``."""
        start = time.perf_counter()
        yield
        self.milliseconds[name] += (time.perf_counter() - start) * 1000

    def run(self, stage: StageSpec, tensors: Mapping[str, Array], owners: IntArray) -> dict[str, Array]:
        """The outputs of ``stage``; row i belongs to image ``owners[i]``.

        Raises:
            EngineError: the engine cannot be run, or its outputs are not those that the manifest declares.
            NonFiniteError: an output has NaN or infinity. Arrays on a device are not copied to find that: it reaches
                the images and logits, which are checked.
        """
        count = len(owners)
        padding = max(0, self._least - count)
        feeds = {t.name: tensors[t.name] for t in stage.inputs}
        if padding:
            repeated = np.append(np.arange(count), np.zeros(padding, np.int64))
            feeds |= {t.name: feeds[t.name][repeated] for t in stage.inputs if t.shape[0] == "B"}
        with self.timed(stage.name):
            outputs = self._engines[stage.name].run(feeds)
        if padding:
            outputs = {name: array[np.arange(count)] for name, array in outputs.items()}
        for declared in stage.outputs:
            if declared.name not in outputs:
                raise EngineError(f"stage {stage.name}: its file has no output {declared.name!r}, which is declared")
            array = outputs[declared.name]
            expected = tuple(count if size == "B" else size for size in declared.shape)
            if tuple(array.shape) != expected:
                raise EngineError(f"stage {stage.name}: {declared.name} has shape {tuple(array.shape)}, not {expected}")
            if isinstance(array, np.ndarray):
                check_finite(stage.name, array, owners)
        return outputs


def check_finite(stage: str, array: Array, owners: IntArray) -> None:
    """Raise NonFiniteError for NaN or infinity. Arrays on a device are checked by the device."""
    if not isinstance(array, np.ndarray):
        finite = array.finite()
    elif np.isfinite(array).all():
        return
    else:
        finite = np.isfinite(array.reshape(len(owners), -1)).all(axis=1)
    if not finite.all():
        raise NonFiniteError(stage, np.unique(owners[~finite]).tolist())


def joined(parts: Sequence[Array]) -> Array:
    """The rows of all ``parts``."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else parts[0].followed_by(parts[1:])
