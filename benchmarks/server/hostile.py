"""Hostile requests among valid ones: each must be refused, and no neighbour, worker or byte of memory be lost to it."""

import asyncio
import collections
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np

from benchmarks.server import load
from benchmarks.server.call import Call, Target
from benchmarks.server.corpus import hostile_calls
from benchmarks.server.deployment import Deployment
from benchmarks.server.nginx import Nginx
from benchmarks.server.saturation import Say
from benchmarks.server.watch import Watch, growth
from benchmarks.server.workload import Workload
from deploy import trial
from evaluation.progress import track

MOST_CLIENTS = 24


def attack(workload: Workload, deployment: Deployment, count: int, say: Say) -> dict[str, Any]:
    """Send ``count`` requests from many clients at once, half of them hostile, and check every answer.

    They go through nginx where it is installed. Valid ones ask for one sample: what is tested here is the
    reading of requests.

    Returns:
        ``through``: "nginx" or "TorchServe" alone; ``requests``, ``valid``, ``valid_wrong``, ``hostile_not_4xx``,
        ``torchserve_500`` (see `Call.also_accept`), ``kinds`` of hostile requests, ``worker_deaths``,
        ``memory_growth`` after the first tenth, ``memory`` as (request, bytes), ``per_second``, ``statuses``, and the
        first that were ``wrong`` as (kind, status, body).
    """
    hostile = hostile_calls(deployment.model, workload.manifest.samples.max)
    clients = min(MOST_CLIENTS, 4 * workload.settings.batch)  # more would not fit the queue, and be refused for that
    calls = _mixed(workload, hostile, count)
    through_nginx = trial.is_possible()
    if not through_nginx:
        say("nginx is not installed: hostile requests go to TorchServe itself, which answers some forms with 500")
    with Nginx(deployment) if through_nginx else nullcontext(deployment) as target:
        result, memory, deaths = asyncio.run(_run(deployment, target, calls, clients))
    right, valid, status = (np.array(column) for column in (result.right, result.valid, result.status))
    done = np.array(result.done)
    is_4xx = (status >= 400) & (status < 500)
    return {
        "through": "nginx" if through_nginx else "TorchServe",
        "requests": len(result),
        "valid": int(valid.sum()),
        "valid_wrong": int((valid & ~right).sum()),
        "hostile_not_4xx": int((~valid & ~right).sum()),
        "torchserve_500": int((~valid & right & ~is_4xx).sum()),
        "kinds": len({call.kind for call in hostile}),
        "worker_deaths": deaths,
        "memory_growth": growth(memory, done[len(done) // 10]),
        "memory": [(int(np.searchsorted(done, moment)), held) for moment, held in memory],
        "per_second": len(done) / float(done[-1] - done[0]) if len(done) > 1 else None,
        "statuses": dict(sorted(collections.Counter(map(str, result.status)).items())),
        "wrong": [(kind, answer, body.decode("utf-8", "replace")) for kind, answer, body in result.wrong],
    }


async def _run(
    deployment: Deployment, target: Target, calls: Iterator[Call], clients: int
) -> tuple[load.LoadResult, list[tuple[float, int]], int]:
    async with Watch(deployment) as watch:
        result = await load.closed(target, calls, clients, timeout=60)
    return result, watch.memory, watch.deaths


def _mixed(workload: Workload, hostile: list[Call], count: int) -> Iterator[Call]:
    rng = np.random.default_rng(0)
    valid = workload.calls(samples=1)
    for _ in track(range(count), "hostile and valid", "request"):
        yield next(valid) if rng.random() < 0.5 else hostile[rng.integers(len(hostile))]
