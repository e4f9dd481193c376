"""What was measured of a server, for people: a page of Markdown and a plot."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.server.measure import DEV_SERVER, TORCHSERVE
from benchmarks.server.saturation import IN_PROCESS
from evaluation.report import conditions, digits, figure, table


def markdown(content: Mapping[str, Any]) -> str:
    """The report as a page."""
    lines = [f"# {content['bundle']} on TorchServe", "", _preamble(content), ""]
    lines += [*_saturation(content), ""]
    for name, section in (
        ("hostile", _hostile),
        ("kills", _kills),
        ("overload", _overload),
        ("soak", _soak),
    ):
        if content[name] is not None:
            lines += [*section(content[name]), ""]
    return "\n".join(lines)


def _preamble(content: Mapping[str, Any]) -> str:
    served = content["settings"]
    return (
        f"{served['samples']} samples of an image, {served['batch']} images a batch, {served['runtime']}, "
        f"{served['precision']}, workers: {served['workers']}, CPU threads of each: {served['threads']}; "
        f"{conditions(content)}. Server, pipeline and load generator share the "
        f"machine; other programs took {served['foreign_cores']:.2f} cores on average."
    )


def _saturation(content: Mapping[str, Any]) -> Iterable[str]:
    found = content["saturation"]
    rounds = found["rounds"]
    yield "## Saturation\n"
    yield f"Images a second with {found['clients']} clients that each wait for their answer, in turns:\n"
    yield from table(
        ["", *(f"round {i + 1}" for i in range(len(next(iter(rounds.values()))))), "median", "of in process"],
        [
            [
                name,
                *map(digits, values),
                digits(found["median"][name]),
                f"{found['median'][name] / found['in_process_images_per_s']:.0%}",
            ]
            for name, values in rounds.items()
        ],
    )
    yield (
        "\nLatency of requests that come at random, counted from when they should have been sent"
        f" (the generator took {found['generator_cpu_us']:.0f} us of CPU a request at saturation):\n"
    )
    yield from table(
        [
            "offered/s",
            "of saturation",
            "answered/s",
            "requests",
            "refused",
            "not right",
            "median, ms",
            "90 %, ms",
            "99 %, ms",
            "sent late, 99 %, ms",
        ],
        [
            [
                digits(row["offered_per_s"]),
                f"{row['fraction']:.0%}",
                digits(row["achieved_per_s"]),
                str(row["requests"]),
                str(row["refused"]),
                str(row["not_right"]),
                *(digits(row[name]) for name in ("p50_ms", "p90_ms", "p99_ms", "late_p99_ms")),
            ]
            for row in found["open_load"]
        ],
    )


def _hostile(found: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"## Hostile requests\n\n{found['requests']} requests through {found['through']}, {found['valid']} of them "
        f"valid, the others of {found['kinds']} hostile kinds, {digits(found['per_second'])} a second: "
        f"{found['valid_wrong']} valid ones not answered rightly, "
        f"{found['hostile_not_4xx']} hostile ones without a status of 400 to 499, "
        f"{found['worker_deaths']} dead workers; memory of the worker after the first tenth and at the end: "
        f"{_share(found['memory_growth'])}."
    )
    if found["torchserve_500"]:
        yield f"\n{found['torchserve_500']} forms were refused with 500 by TorchServe's own reader; nginx asks ours."


def _kills(found: Mapping[str, Any]) -> Iterable[str]:
    seconds = ", ".join("never" if value is None else f"{value:.1f}" for value in found["recovery_s"])
    yield (
        f"## Killed workers\n\nSeconds until the next right answer: {seconds}. Of {found['requests']} requests "
        f"{found['right']} were answered rightly, {found['wrong']} wrongly; {sum(found['errors'].values())} "
        f"got an error, {found['lost']} of these hung."
    )


def _overload(found: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"## Overload\n\n{digits(found['offered_per_s'])} requests a second for {found['seconds']:g} s, where "
        f"{digits(found['sustainable_per_s'])} can be answered: {digits(found['goodput_per_s'])} a second were, "
        f"{found['goodput_ratio']:.0%}, half of them within {digits(found['p50_ms'])} ms and 99 % within "
        f"{digits(found['p99_ms'])} ms. {found['refused']} were refused, half of them within "
        f"{digits(found['refusal_p50_ms'])} ms, 99 % within {digits(found['refusal_p99_ms'])} ms, {found['slow']} "
        f"later than a second; {found['errors']} ended with another error, {found['lost']} not at all."
    )


def _soak(found: Mapping[str, Any]) -> Iterable[str]:
    first, last = found["parts"][0], found["parts"][-1]
    yield (
        f"## Soak\n\n{found['requests']} requests in {found['seconds']:g} s, {digits(found['offered_per_s'])} a "
        f"second: {found['refused']} refused, {found['not_right']} others not answered rightly, "
        f"{found['worker_deaths']} dead workers; median and 99 % {digits(first['p50_ms'])} and "
        f"{digits(first['p99_ms'])} ms in the first part, {digits(last['p50_ms'])} and {digits(last['p99_ms'])} ms in "
        f"the last; memory of the worker after the first tenth and at the end: {_share(found['memory_growth'])}."
    )


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:+.1%}"


def plot(content: Mapping[str, Any], file: Path) -> None:
    """Latency against offered load, with where servers saturate; and the worker's memory where that was watched."""
    import matplotlib.ticker

    found = content["saturation"]
    watched = [(name, content[name]["memory"]) for name in ("hostile", "soak") if content[name] is not None]
    drawn = figure(7.5 + 4 * len(watched), 4.6)
    panels = drawn.subplots(1, 1 + len(watched), squeeze=False, width_ratios=[1.8, *[1] * len(watched)])[0]
    rows = found["open_load"]
    offered = [row["offered_per_s"] for row in rows]
    lines = (("p99_ms", "99 %", "#b04a3a"), ("p90_ms", "90 %", "#d9a441"), ("p50_ms", "median", "#4878a8"))
    for name, label, colour in lines:
        panels[0].plot(offered, [row[name] for row in rows], "o-", color=colour, label=label)
    styles = {TORCHSERVE: ("black", "--"), IN_PROCESS: ("gray", "-"), DEV_SERVER: ("gray", ":")}
    for name, rate in found["median"].items():
        colour, style = styles[name]
        panels[0].axvline(rate, color=colour, linestyle=style, linewidth=1.2, label=f"most: {name}, {digits(rate)}/s")
    if any(row["p50_ms"] for row in rows):  # there is no logarithmic axis without a value on it
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        panels[0].yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    panels[0].grid(axis="y", which="both", alpha=0.25)
    panels[0].set_xlim(left=0)
    panels[0].set_xlabel("requests offered a second, at random moments")
    panels[0].set_ylabel("latency of right answers, ms")
    panels[0].set_title(f"{content['bundle']}, {content['settings']['samples']} samples an image")
    panels[0].legend(loc="upper left", fontsize=8)
    for panel, (name, memory) in zip(panels[1:], watched, strict=True):
        panel.plot([place for place, _ in memory], [held / 1e6 for _, held in memory], color="#4878a8")
        panel.set_ylim(0, 1.15 * max(held for _, held in memory) / 1e6)
        panel.set_xlabel("hostile and valid requests" if name == "hostile" else "seconds of soak")
        panel.set_title("memory of the worker, MB")
    drawn.savefig(file)
