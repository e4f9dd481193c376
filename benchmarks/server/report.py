"""What was measured of a server, as a page of Markdown and a plot."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.server.measure import DEV_SERVER, IN_PROCESS, TORCHSERVE
from evaluation.report import conditions, digits, figure, table

Section = Callable[[Mapping[str, Any]], str]
"""Makes a chapter of the page from the findings of a stress test."""

_COLUMNS = {
    "offered/s": "offered_per_s",
    "of saturation": "fraction",
    "answered/s": "achieved_per_s",
    "requests": "requests",
    "refused": "refused",
    "failed": "failed",
    "median, ms": "p50_ms",
    "90 %, ms": "p90_ms",
    "99 %, ms": "p99_ms",
    "sent late, 99 %, ms": "late_p99_ms",
}
_STYLES = {TORCHSERVE: ("black", "--"), IN_PROCESS: ("gray", "-"), DEV_SERVER: ("gray", ":")}


def markdown(content: Mapping[str, Any], sections: Mapping[str, Section]) -> str:
    """The report as a page, with a chapter of each of the ``sections``."""
    chapters = [_saturation(content["saturation"]), *(section(content[name]) for name, section in sections.items())]
    return "\n\n".join([f"# {content['bundle']} on TorchServe", _conditions(content), *chapters]) + "\n"


def _conditions(content: Mapping[str, Any]) -> str:
    served = content["settings"]
    return (
        f"{served['samples']} samples of an image, {served['batch']} images a batch, {served['runtime']}, "
        f"{served['precision']}, workers: {served['workers']}, CPU threads of each: {served['threads'] or 'all'}; "
        f"{conditions(content)}. Server, pipeline and load generator share the machine; other programs took "
        f"{served['background_cores']:.2f} cores on average."
    )


def _saturation(found: Mapping[str, Any]) -> str:
    rounds, medians, alone = found["rounds"], found["median"], found["in_process_images_per_s"]
    rates = table(
        ["", *(f"round {i + 1}" for i in range(len(rounds[IN_PROCESS]))), "median", "of in process"],
        [
            [name, *map(digits, rates), digits(medians[name]), f"{medians[name] / alone:.0%}"]
            for name, rates in rounds.items()
        ],
    )
    return "\n".join(
        [
            "## Saturation\n",
            f"Images a second with {found['clients']} clients that each wait for their answer, in turns:\n",
            *rates,
            "\nLatency of requests that come at random, counted from when they should have been sent "
            f"(the load generator took {found['generator_cpu_us']:.0f} us of CPU a request at saturation):\n",
            *table(list(_COLUMNS), [list(_cells(row)) for row in found["open_load"]]),
        ]
    )


def _cells(row: Mapping[str, Any]) -> Iterable[str]:
    for key in _COLUMNS.values():
        value = row[key]
        yield f"{value:.0%}" if key == "fraction" else str(value) if isinstance(value, int) else digits(value)


def plot(content: Mapping[str, Any], file: Path, sections: Iterable[str] = ()) -> None:
    """Latency against offered load, with where servers saturate; and the workers' memory where that was watched."""
    import matplotlib.ticker

    found, rows = content["saturation"], content["saturation"]["open_load"]
    watched = {name: content[name]["memory"] for name in sections if "memory" in content[name]}
    drawn = figure(7.5 + 4 * len(watched), 4.6)
    latency, *panels = drawn.subplots(1, 1 + len(watched), squeeze=False, width_ratios=[1.8, *[1] * len(watched)])[0]
    offered = [row["offered_per_s"] for row in rows]
    for key, label, colour in (
        ("p99_ms", "99 %", "#b04a3a"),
        ("p90_ms", "90 %", "#d9a441"),
        ("p50_ms", "median", "#4878a8"),
    ):
        latency.plot(offered, [row[key] for row in rows], "o-", color=colour, label=label)
    for name, rate in found["median"].items():
        colour, style = _STYLES[name]
        latency.axvline(
            rate, color=colour, linestyle=style, linewidth=1.2, label=f"saturation, {name}: {digits(rate)}/s"
        )
    if any(row["p50_ms"] for row in rows):  # there is no logarithmic axis without a value on it
        latency.set_yscale("log")
        latency.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        latency.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    latency.grid(axis="y", which="both", alpha=0.25)
    latency.set(
        xlim=(0, None),
        xlabel="requests offered a second, at random moments",
        ylabel="latency of correct answers, ms",
        title=f"{content['bundle']}, {content['settings']['samples']} samples an image",
    )
    latency.legend(loc="upper left", fontsize=8)
    for panel, (name, memory) in zip(panels, watched.items(), strict=True):
        seconds, megabytes = [moment for moment, _ in memory], [held / 1e6 for _, held in memory]
        panel.plot(seconds, megabytes, color="#4878a8")
        panel.set(ylim=(0, 1.15 * max(megabytes)), xlabel=f"seconds of {name} load", title="memory of the workers, MB")
    drawn.savefig(file)
