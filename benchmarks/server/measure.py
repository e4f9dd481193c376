"""The whole measurement: servers up, load, hostile requests, kills, overload, and everything down again."""

import contextlib
from dataclasses import dataclass
from typing import Any

from benchmarks.server.deployment import Deployment
from benchmarks.server.hostile import attack
from benchmarks.server.kills import kill
from benchmarks.server.litserve import LitServe
from benchmarks.server.neighbours import Neighbours
from benchmarks.server.overload import overload
from benchmarks.server.saturation import HALF, IN_PROCESS, Entrant, Say, curve, saturate
from benchmarks.server.soak import soak
from benchmarks.server.subject import Settings, Subject
from export import archive

TORCHSERVE, LITSERVE = "TorchServe", "LitServe"


@dataclass(frozen=True)
class Plan:
    """What is done, and for how long.

    Attributes:
        seconds: of each load; saturation is measured in so many ``rounds`` of it.
        litserve: compare with LitServe.
        hostile: requests, half of them hostile.
        kills: of the workers.
        overload, soak: seconds.
    """

    seconds: float = 10.0
    rounds: int = 3
    litserve: bool = True
    hostile: int = 0
    kills: int = 0
    overload: float = 0.0
    soak: float = 0.0


def measure(
    settings: Settings, served: archive.Settings, workers: int, threads: int, plan: Plan, say: Say
) -> dict[str, Any]:
    """Serve a bundle on free ports of loopback, measure it as ``plan`` says, and leave nothing behind.

    Args:
        settings: of the pipeline in process; LitServe gets the same.
        served: of the archive.
        workers: of each server.
        threads: of each worker; 0 for every core.

    Returns:
        ``settings``, ``saturation``, ``litserve`` images a second, ``hostile``, ``kills``, ``overload`` and ``soak``;
        None for what was not done.
    """
    with contextlib.ExitStack() as stack:
        say("loading the pipeline")
        subject = stack.enter_context(Subject(settings))
        subject.images_per_s(0)
        say("starting TorchServe")
        deployment = stack.enter_context(Deployment(settings.bundle, served, workers, threads))
        entrants = [Entrant(TORCHSERVE, deployment)]
        if plan.litserve:
            say("starting LitServe")
            rival = stack.enter_context(LitServe(settings, workers, threads, served.batch_delay_ms))
            entrants.append(Entrant(LITSERVE, rival, True, rival.awake))
        neighbours = Neighbours([deployment.server.process()])
        found = saturate(subject, entrants, workers, plan.seconds, plan.rounds, say)
        sustainable = found["median"][TORCHSERVE]
        rows = curve(subject, deployment, sustainable, plan.seconds, say)
        foreign = neighbours.cores()
        half = next(row for row in rows if row["fraction"] == HALF)
        alone = found["median"][IN_PROCESS]
        return {
            "settings": {
                "samples": settings.samples,
                "batch": settings.batch,
                "runtime": subject.runtime,
                "precision": subject.manifest.precision,
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
            "litserve": found["median"].get(LITSERVE),
            "hostile": attack(subject, deployment, plan.hostile, say) if plan.hostile else None,
            "overload": overload(subject, deployment, sustainable, plan.overload) if plan.overload else None,
            "soak": soak(subject, deployment, sustainable, plan.soak, say) if plan.soak else None,
            "kills": kill(subject, deployment, plan.kills, say) if plan.kills else None,
        }
