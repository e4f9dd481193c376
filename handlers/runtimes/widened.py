"""Weights that a graph stores in half precision, widened to fp32 before OpenVINO compiles it.

OpenVINO does so by itself, but in memory that it never gives back, beside its own copy of every weight. Here they go to
a file, which is mapped like the external data of a graph in fp32, and whose pages are given back like those.
"""

import math
import mmap
import os
import tempfile

import numpy as np
import openvino as ov

from handlers.runtimes import cache, memory

_PAGE = 4096
_STEP = 4_000_000  # numbers that are widened at once: a fully connected layer can have 500 million
_HALF = {ov.Type.f16, ov.Type.bf16}


class Widened:
    """The weights of ``model`` that are stored in half precision, now in fp32: in memory, or if large in a file.

    The file has no name, so nothing is left of it when the process ends. It lies in the cache's folder
    (`handlers.runtimes.cache`), or where there is none among the temporary files. Where it does not fit, OpenVINO is
    left to widen the weights.

    Attributes:
        bytes: of these weights in fp32.
    """

    def __init__(self, model: ov.Model) -> None:
        self._map: mmap.mmap | None = None
        casts = [op for op in model.get_ops() if op.get_type_name() == "Convert" and _widens_constant(op)]
        sizes = [4 * math.prod(op.get_output_shape(0)) for op in casts]
        self.bytes = sum(sizes)
        if not casts:
            return
        places = np.cumsum([0, *(-(-size // _PAGE) * _PAGE for size in sizes)]).tolist()
        try:
            self._map = _space(places[-1], self.bytes > memory.LARGE_BYTES)
        except OSError:  # a full disk
            return
        for op, place in zip(casts, places, strict=False):
            constant, shape = op.input_value(0).get_node(), tuple(op.get_output_shape(0))
            wide, half = np.frombuffer(self._map, np.float32, math.prod(shape), place), constant.data.ravel()
            for start in range(0, len(wide), _STEP):
                part = slice(start, start + _STEP)
                if constant.get_output_element_type(0) == ov.Type.f16:
                    np.copyto(wide[part], half[part])
                else:  # the upper half of an fp32 number, which numpy does not know
                    np.left_shift(half[part].view(np.uint16), 16, out=wide[part].view(np.uint32), dtype=np.uint32)
                self.forget()
            op.output(0).replace(ov.op.Constant(wide.reshape(shape), shared_memory=True).output(0))

    def forget(self) -> None:
        """Give back the memory in which this process sees the file."""
        if self._map is not None and self.bytes > memory.LARGE_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)


def _widens_constant(cast: ov.Node) -> bool:
    """Whether ``cast`` makes fp32 of a constant in half precision."""
    source = cast.input_value(0)
    types = source.get_element_type() in _HALF and cast.get_output_element_type(0) == ov.Type.f32
    return types and source.get_node().get_type_name() == "Constant"


def _space(size: int, large: bool) -> mmap.mmap:
    """``size`` bytes that can be written to: if ``large``, of a file without a name.

    Raises:
        OSError: the file does not fit on its disk.
    """
    if not large:
        return mmap.mmap(-1, size)
    with tempfile.TemporaryFile(dir=cache.own_folder("weights")) as stream:
        os.posix_fallocate(stream.fileno(), 0, size)  # else a full disk would kill the process
        return mmap.mmap(stream.fileno(), size)
