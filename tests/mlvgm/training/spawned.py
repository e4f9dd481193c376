"""Training in a process of its own: the threads of inference runtimes do not bear with those of autograd."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def spawned(function: Callable[..., T], *arguments: object) -> T:
    """``function(*arguments)`` in a process without inference runtimes."""
    context = multiprocessing.get_context("spawn")
    # One thread: several wait for each other where the cores are busy.
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *arguments).result(timeout=900)
