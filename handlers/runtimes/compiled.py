"""Programs compiled by PyTorch's Inductor, which makes one kernel of many passes over a feature map."""

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

CACHE = "TORCHINDUCTOR_CACHE_DIR"
_SHAPES = 64  # that one module may be compiled for; PyTorch's own limit is 8, fewer than there are batch sizes


class Compiled:
    """A module that is compiled for each shape of its inputs, when it first gets them, or runs as it is if that fails.

    For each shape and not for any batch: only then does Inductor keep feature maps channels last. It makes no CUDA
    graphs here, since `handlers.runtimes.cuda_graphs` does.
    """

    def __init__(self, module: Callable[..., Any], backend: str | Callable[..., Any] = "inductor") -> None:
        use_private_cache()
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
        self._module = module
        self._compiled: Callable[..., Any] = torch.compile(module, dynamic=False, fullgraph=True, backend=backend)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        try:
            return self._compiled(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may raise anything
            result = self._module(*tensors)  # which fails as well if not the compiler but the inputs are at fault
            self._compiled = self._module
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
        os.environ[CACHE] = str(_own_folder() or tempfile.mkdtemp(prefix="mlvgm-inductor-"))


def _own_folder() -> Path | None:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlvgm" / "inductor"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        return None
    private = found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK)
    return folder if private else None
