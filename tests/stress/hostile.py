"""Hostile requests among valid ones: each must be refused, and no other request, worker or memory be lost to it."""

import asyncio
import collections
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.server import load, servers
from benchmarks.server.calls import Call, Endpoint
from benchmarks.server.load import Say
from benchmarks.server.servers import Deployment
from benchmarks.server.workload import Workload
from deploy import trial
from deploy.nginx import Nginx
from deploy.output import Output
from deploy.readiness import Readiness
from deploy.server import free_ports, port_is_taken
from evaluation.progress import track
from evaluation.report import digits
from tests.stress.corpus import hostile_calls
from tests.stress.watch import Watch, in_words

MAX_CLIENTS = 24
_KEYS = 256  # so that none of them is over the rate that deploy/nginx.conf lets a client have


def run(count: int, workload: Workload, deployment: Deployment, _: float, say: Say) -> dict[str, Any]:
    """Send ``count`` requests from many clients at once, half of them hostile, and check every answer.

    They go through nginx where it is installed. Valid ones ask for one sample: what is tested here is the reading of
    requests.

    Returns:
        ``through``: "nginx" or "TorchServe" alone; ``requests``, ``valid``, ``valid_wrong``, ``hostile_not_4xx``,
        ``torchserve_500`` (see `Call.also_accept`), ``kinds`` of hostile requests, ``per_second``, ``statuses``, the
        first that were ``wrong`` as (kind, status, body), and the findings of a `Watch`.
    """
    hostile = hostile_calls(deployment.endpoint.model, workload.manifest.samples.max)
    clients = min(MAX_CLIENTS, 4 * workload.settings.archive.batch_size)  # more would not fit the queue, and be refused
    through_nginx = trial.is_possible()
    through = "nginx" if through_nginx else "TorchServe"
    say(f"hostile requests: {count} through {through} from {clients} clients, half of them valid")
    if not through_nginx:
        say("nginx is not installed: TorchServe itself answers some forms with 500")
    with _nginx(deployment) if through_nginx else nullcontext(deployment.endpoint) as endpoint:
        result, watched = asyncio.run(_send(deployment, endpoint, _mixed(workload, hostile, count), clients))
    rows = result.table()
    correct, valid, status, done = (rows[name] for name in ("correct", "valid", "status", "done"))
    is_4xx = (status >= 400) & (status < 500)
    return {
        "through": through,
        "requests": len(rows),
        "valid": int(valid.sum()),
        "valid_wrong": int((valid & ~correct).sum()),
        "hostile_not_4xx": int((~valid & ~correct).sum()),
        "torchserve_500": int((~valid & correct & ~is_4xx).sum()),
        "kinds": len({call.kind for call in hostile}),
        "per_second": len(done) / float(done[-1] - done[0]) if len(done) > 1 else None,
        "statuses": dict(sorted(collections.Counter(map(str, status)).items())),
        "wrong": [(kind, answer, body.decode("utf-8", "replace")) for kind, answer, body in result.wrong],
        **watched,
    }


def section(found: Mapping[str, Any]) -> str:
    """What `run` found, for the report."""
    text = (
        f"## Hostile requests\n\n{found['requests']} requests through {found['through']}, "
        f"{digits(found['per_second'])} a second. Of {found['valid']} valid ones {found['valid_wrong']} were not "
        f"answered correctly; of the others, which were hostile in {found['kinds']} ways, {found['hostile_not_4xx']} "
        f"were not refused with a status of 400 to 499. {in_words(found)}."
    )
    if found["torchserve_500"]:
        text += f"\n\nTorchServe's own reader refused {found['torchserve_500']} forms with 500; nginx asks ours."
    return text


@contextmanager
def _nginx(deployment: Deployment) -> Iterator[Endpoint]:
    """nginx in front of ``deployment``, over TLS, as deploy/pair.py runs it: what clients see."""
    keys = [f"client-{i}" for i in range(_KEYS)]
    lines = cycle([f"X-Api-Key: {key}\r\n".encode() for key in keys])
    port, server = free_ports(1), deployment.server
    with tempfile.TemporaryDirectory(prefix="mlvgm-") as folder:
        etc = Path(folder) / "etc"
        conf = trial.write(etc, port, server.folder.parent, dict(zip(keys, keys, strict=True)), quiet=True)
        process = Nginx(conf, server, Readiness(server, 60), Output(1))
        try:
            process.start()
            servers.await_start("nginx", lambda: port_is_taken(port), process.ended, 30)
            tls = ssl.create_default_context(cafile=etc / "private" / "tls.crt")
            yield Endpoint(port, deployment.endpoint.model, lambda: next(lines), tls)
        finally:
            process.drain(timeout=10)


async def _send(
    deployment: Deployment, endpoint: Endpoint, calls: Iterator[Call], clients: int
) -> tuple[load.LoadResult, dict[str, Any]]:
    async with Watch(deployment) as watch:
        result = await load.closed_load(endpoint, calls, clients, timeout=60)
    return result, watch.findings()


def _mixed(workload: Workload, hostile: list[Call], count: int) -> Iterator[Call]:
    rng = np.random.default_rng(0)
    valid = workload.calls(samples=1)
    for _ in track(range(count), "hostile and valid", "request"):
        yield next(valid) if rng.random() < 0.5 else hostile[rng.integers(len(hostile))]
