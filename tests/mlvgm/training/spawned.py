"""Training in a process of its own: the threads of inference runtimes do not bear with those of autograd."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def spawned(function: Callable[..., T], *arguments: object) -> T:
    """``function(*arguments)`` in a process without inference runtimes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=900)
