"""The whole measurement: servers up, load, hostile requests, kills, overload, and everything down again."""

import contextlib
from dataclasses import dataclass
from typing import Any

from benchmarks.server.background_load import BackgroundLoad
from benchmarks.server.deployment import Deployment
from benchmarks.server.dev_server import DevServer
from benchmarks.server.hostile import attack
from benchmarks.server.kills import kill
from benchmarks.server.overload import overload
from benchmarks.server.saturation import HALF, IN_PROCESS, Say, ServerUnderTest, curve, saturate
from benchmarks.server.soak import soak
from benchmarks.server.workload import Workload, WorkloadSettings
from export import archive

TORCHSERVE, DEV_SERVER = "TorchServe", "development server"


@dataclass(frozen=True)
class Plan:
    """What is done, and for how long.

    Attributes:
        seconds: of each load; saturation is measured in so many ``rounds`` of it.
        dev_server: compare with the development server.
        hostile: requests, half of them hostile.
        kills: of the workers.
        overload, soak: seconds.
    """

    seconds: float = 10.0
    rounds: int = 3
    dev_server: bool = True
    hostile: int = 0
    kills: int = 0
    overload: float = 0.0
    soak: float = 0.0


def measure(
    settings: WorkloadSettings, served: archive.Settings, workers: int, threads: int, plan: Plan, say: Say
) -> dict[str, Any]:
    """Serve a bundle on free ports of loopback, measure it as ``plan`` says, and leave nothing behind.

    Args:
        settings: of the pipeline in process; the development server gets the same.
        served: of the archive.
        workers: of each server.
        threads: of each worker; 0 for every core.

    Returns:
        ``settings``, ``saturation``, ``hostile``, ``kills``, ``overload`` and ``soak``;
        None for what was not done.
    """
    with contextlib.ExitStack() as stack:
        say("loading the pipeline")
        workload = stack.enter_context(Workload(settings))
        workload.images_per_s(0)
        say("starting TorchServe")
        deployment = stack.enter_context(Deployment(settings.bundle, served, workers, threads))
        servers = [ServerUnderTest(TORCHSERVE, deployment)]
        if plan.dev_server:
            say("starting the development server")
            other = DevServer(settings, threads * workers, served.batch_delay_ms)
            servers.append(ServerUnderTest(DEV_SERVER, stack.enter_context(other)))
        background = BackgroundLoad([deployment.server.process()])
        found = saturate(workload, servers, workers, plan.seconds, plan.rounds, say)
        sustainable = found["median"][TORCHSERVE]
        rows = curve(workload, deployment, sustainable, plan.seconds, say)
        foreign = background.cores()
        half = next(row for row in rows if row["fraction"] == HALF)
        alone = found["median"][IN_PROCESS]
        return {
            "settings": {
                "samples": settings.samples,
                "batch": settings.batch,
                "runtime": workload.runtime,
                "precision": workload.manifest.precision,
                "threads": threads,
                "workers": workers,
                "batch_delay_ms": served.batch_delay_ms,
                "foreign_cores": foreign,
            },
            "saturation": {
                "server_images_per_s": sustainable,
                "in_process_images_per_s": alone,
                "ratio": sustainable / alone,
                "p50_ms": half["p50_ms"],
                "p99_ms": half["p99_ms"],
                **found,
                "open_load": rows,
            },
            "hostile": attack(workload, deployment, plan.hostile, say) if plan.hostile else None,
            "overload": overload(workload, deployment, sustainable, plan.overload) if plan.overload else None,
            "soak": soak(workload, deployment, sustainable, plan.soak, say) if plan.soak else None,
            "kills": kill(workload, deployment, plan.kills, say) if plan.kills else None,
        }
