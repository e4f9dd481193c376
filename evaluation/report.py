"""Reports of measurements: the same content as JSON, as a page of Markdown, and as a plot."""

import datetime
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation import machine

Content = Mapping[str, Any]


def measured_here() -> dict[str, Any]:
    """The conditions of a measurement for its report: "machine" and "date"."""
    return {"machine": machine.describe(), "date": datetime.date.today().isoformat()}


def conditions(content: Content) -> str:
    """`measured_here` as text."""
    here = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    date = f"; {content['date']}" if "date" in content else ""
    gpu = f"{here['gpu']}, " if "gpu" in here else ""
    return f"{gpu}{here['processor']}, {here['cores']} cores, Python {here['python']}, {versions}{date}"


def save(content: Content, page: str, path: Path, draw: Callable[[Path], None] | None = None) -> None:
    """Write ``content`` to ``path`` as JSON and, beside it under the same name, ``page`` as .md and a plot as .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_strict(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    written = [str(path), path.with_suffix(".md").name]
    if draw is not None:
        draw(path.with_suffix(".png"))
        written.append(path.with_suffix(".png").name)
    print(f"wrote {', '.join(written)}")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def digits(value: float | None) -> str:
    """Three significant digits; nothing for None."""
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure that needs no display; sizes in inches. Save it with ``savefig``."""
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), dpi=130, layout="constrained")


def _strict(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
