"""The work of a bulk job on the machines of a Ray cluster.

Ray Core's tasks rather than Ray Data: a job has one process that writes, the one that was started, and it takes the
results of a batch once, however often Ray had to compute them. So what `mlvgm.cli.bulk` says of a job, no answer lost
and none made twice, holds for a cluster as well, and workers need no storage in common.
"""

import contextlib
import functools
import logging
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deploy.errors import CliError
from mlvgm.cli.bulk import Outcome, Submit

_TRIES = 3  # of a batch whose worker or machine is lost
_AHEAD = 2  # batches for each worker: one in work, one on its way


@contextlib.contextmanager
def workers(
    address: str, threads: int, make: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[Submit, int]]:
    """What hands batches to workers, and how many to have under way: for ``threads`` cores of a cluster a worker each.

    Args:
        address: of its control service, HOST:PORT, or "auto" for the one that this machine belongs to.
        make: arguments of `mlvgm.cli.purify.FilePurifier`, which each worker makes for itself.
        settings: those of the `FilePurifier` here: a worker's have to be equal, or its bundle is another.

    Raises:
        CliError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise CliError("--ray needs Ray: pip install '.[scale]'") from None
    mine = not ray.is_initialized()
    if mine:
        try:
            if address != "auto":  # Ray itself tries for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise CliError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None
    try:
        task = ray.remote(num_cpus=threads, max_retries=_TRIES - 1)(_purify)

        def submit(images: Sequence[bytes]) -> Callable[[], Sequence[Outcome]]:
            return functools.partial(outcomes, task.remote(dict(make), dict(settings), images), images)

        def outcomes(promised: Any, images: Sequence[bytes]) -> Sequence[Outcome]:
            try:
                return ray.get(promised)
            except ray.exceptions.RayTaskError as error:
                raise CliError(f"a worker failed: {error.cause}") from None
            except ray.exceptions.RayError as error:
                if len(images) == 1:
                    return [f"its worker was lost {_TRIES} times: {str(error).splitlines()[0]}"]
                alone = [submit([image]) for image in images]  # one of them may be what ends the worker
                return [outcome for each in alone for outcome in each()]

        yield submit, _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
    finally:
        if mine:
            ray.shutdown()


def _purify(make: Mapping[str, Any], settings: Mapping[str, Any], images: Sequence[bytes]) -> Sequence[Outcome]:
    """In a worker."""
    purifier = _purifier(*sorted(make.items()))
    if purifier.settings != settings:
        raise CliError(f"the bundle {make['bundle']} of {platform.node()} is another one")
    return purifier.purify(images)


@functools.lru_cache(maxsize=1)
def _purifier(*make: tuple[str, Any]) -> Any:
    """Loaded once in each process, which Ray keeps for the next task."""
    from mlvgm.cli.purify import FilePurifier

    return FilePurifier(**dict(make))
