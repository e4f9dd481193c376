"""Programs compiled by PyTorch's Inductor, which makes one kernel of many passes over a feature map."""

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Collection
from typing import Any

import torch

from handlers.runtimes import cache

logger = logging.getLogger(__name__)

CACHE = "TORCHINDUCTOR_CACHE_DIR"


class Compiled:
    """A module that is compiled for each batch size among ``sizes`` at its first run with it.

    For each size and not for any batch: only then does Inductor keep feature maps channels last. It makes no CUDA
    graphs here, since `handlers.runtimes.cuda_graphs` does. With other sizes, and where compiling fails, the module
    runs as it is. The first of its inputs has a batch axis.
    """

    def __init__(
        self, module: Callable[..., Any], sizes: Collection[int], backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self._module, self._sizes = module, sizes
        if sizes:
            use_private_cache()
        self._compiled: Callable[..., Any] = torch.compile(module, dynamic=False, fullgraph=True, backend=backend)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        if len(tensors[0]) not in self._sizes:
            return self._module(*tensors)
        try:
            return self._compiled(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may raise anything
            result = self._module(*tensors)  # which fails as well if not the compiler but the inputs are at fault
            self._sizes = ()
            reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            _warn(f"programs run several times slower than they could, because PyTorch cannot compile them: {reason}")
            return result


@functools.cache
def _warn(message: str) -> None:
    """Log ``message`` if it is the first time: engines fail for the same reason one after another."""
    logger.warning(message)


@functools.cache
def use_private_cache() -> None:
    """Let a later process find what this one compiles, in a folder that only this user can write to.

    What lies there is executed when it is loaded. PyTorch's own default is a folder of ``/tmp`` whose name others know.
    Where no folder can be made, compiling fails.
    """
    if os.environ.get(CACHE):
        return
    with contextlib.suppress(OSError):
        os.environ[CACHE] = str(cache.own_folder("inductor") or tempfile.mkdtemp(prefix="mlvgm-inductor-"))
