"""Which runtime "auto" has been measured to be on this machine, for each bundle.

Measured by `handlers.fastest`, for ``mlvgm export`` and ``mlvgm doctor --bundle`` alone. Whoever loads a bundle only
looks up what they have found: so no start takes longer or computes beside a server that answers, and all workers agree.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from handlers import cores, packages
from handlers.fields import FieldError, read_strict
from handlers.manifest import Manifest
from handlers.runtimes import cache, candidates

_KEPT = "choices"  # folder of the cache


@dataclass(frozen=True)
class Choice:
    """A runtime, why it was chosen, and what was measured.

    Attributes:
        milliseconds: by runtime, then for "one image" and "a batch"; empty for a runtime that failed.
    """

    runtime: str
    reason: str
    milliseconds: dict[str, dict[str, float]]

    def __str__(self) -> str:
        figures = (
            f"{name} {', '.join(f'{ms:.1f} ms for {what}' for what, ms in found.items()) or 'fails'}"
            for name, found in self.milliseconds.items()
        )
        return "; ".join([f"{self.runtime}, {self.reason}", *figures])


def kept(manifest: Manifest) -> Choice | None:
    """What has been measured of a bundle with these libraries, on a CPU like this one; None for nothing."""
    if (content := cache.read(_KEPT, _key(manifest))) is None:
        return None
    try:
        choice = read_strict(Choice, json.loads(content), "choice")
    except (ValueError, FieldError):
        return None
    return choice if choice.runtime in candidates() else None


def keep(manifest: Manifest, choice: Choice) -> None:
    """Let `kept` find ``choice``, if anything can be kept here (`handlers.runtimes.cache`)."""
    cache.write(_KEPT, _key(manifest), json.dumps(dataclasses.asdict(choice)).encode())


def _key(manifest: Manifest) -> dict[str, Any]:
    return {
        "graphs": [manifest.graph_digest(stage.file) for stage in manifest.stages],
        "precision": manifest.precision,
        "batch": dataclasses.asdict(manifest.batch),
        "cpu": cores.kind(),
        "cores": cores.usable(),
        # None of its name where it is in another distribution, such as onnxruntime-gpu.
        "versions": {name: packages.version(name) or "" for name in candidates()},
    }
