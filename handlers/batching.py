"""Batch sizes of engine calls."""

from collections.abc import Iterator, Sequence

import numpy as np

from handlers.arrays import IntArray
from handlers.manifest import Batch


def buckets(batch: Batch, on_cpu: bool, *further: int) -> list[int]:
    """The batch sizes of all engine calls, largest first. They are few, because runtimes prepare for each size.

    Those of ``further`` are among them where the engine takes so many.
    """
    most = batch.most(on_cpu)
    sizes = {2**i for i in range(most.bit_length())} | {batch.min, batch.opt, most, *further}
    return sorted((size for size in sizes if batch.min <= size <= most), reverse=True)


def chunks(start: int, stop: int, sizes: Sequence[int]) -> Iterator[IntArray]:
    """The numbers from ``start`` to ``stop`` in runs that fill a bucket, but for a last one that fills none."""
    while start < stop:
        size = next((size for size in sizes if size <= stop - start), stop - start)
        yield np.arange(start, start + size)
        start += size
