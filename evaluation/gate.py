"""Thresholds that a release must reach: ``mlvgm evaluate --gate FILE``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from handlers.fields import Range, read_strict
from mlvgm.yaml_file import read_yaml

Share = Annotated[float, Range(0.0, 1.0)]


@dataclass(frozen=True)
class Gate:
    """The least shares, from 0 to 1, of what is measured. Those that are left out are not asked for.

    Attributes:
        defence: the row that must reach them.
        clean: of clean images classified correctly.
        attacked: threat -> of attacked images classified correctly; "worst" for those that withstand all.
        certified: radius -> of images classified correctly with a larger one.
        score: threat -> of attacked images that the score finds at 1 % false alarms.
        flagged: the largest share of clean images that may be flagged.
    """

    defence: str = "served"
    clean: Share | None = None
    attacked: Mapping[str, Share] = field(default_factory=dict)
    certified: Mapping[float, Share] = field(default_factory=dict)
    score: Mapping[str, Share] = field(default_factory=dict)
    flagged: Share | None = None

    @classmethod
    def read(cls, path: Path) -> "Gate":
        """Raises FieldError, naming the file and what is wrong in it, or OSError."""
        return read_strict(cls, read_yaml(path), str(path))

    def refusals(self, content: Mapping[str, Any]) -> list[str]:
        """What of a report (`evaluation.robustness.summarise`) misses its threshold or is not there, a line each."""
        return [line for what, limit, measured in self._asked(content) if (line := _refusal(what, limit, measured))]

    def _asked(self, content: Mapping[str, Any]) -> Iterator[tuple[str, float, Mapping[str, Any] | None]]:
        def at(*keys: str) -> Any:
            found: Any = content
            for key in keys:
                found = found.get(key, {})
            return found or None

        row = self.defence
        if self.clean is not None:
            yield "clean", self.clean, at("accuracy", row, "clean")
        for threat, limit in self.attacked.items():
            yield threat, limit, at("worst", row) if threat == "worst" else at("accuracy", row, threat)
        for radius, limit in self.certified.items():
            yield f"certified at L2 {radius}", limit, at("certified", row, str(radius))
        for threat, limit in self.score.items():
            yield f"score on {threat}", limit, at("detection", row, threat, "found", "0.01")
        if self.flagged is not None:
            entry = at("detection", row, "clean", "flagged")
            opposite = entry and {**entry, "share": 1 - entry["share"], "count": entry["n"] - entry["count"]}
            yield "clean and not flagged", 1 - self.flagged, opposite


def _refusal(what: str, limit: float, measured: Mapping[str, Any] | None) -> str | None:
    if measured is None:
        return f"{what}: not measured, must be {limit:.1%} at least"
    if measured["share"] < limit:
        return f"{what}: {measured['share']:.1%} of {measured['n']} images, must be {limit:.1%} at least"
    return None
