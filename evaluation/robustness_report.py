"""What `evaluation.robustness` has found, as a page and as a plot."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evaluation import aisvs
from evaluation.report import Content, conditions, figure, table
from evaluation.shares import percent


def markdown(content: Content) -> str:
    """The page."""
    lines = [f"# Robustness of {content['model']}", "", f"**{content['conclusion']}**", "", _preamble(content), ""]
    lines += [
        "Accuracy with 95 % intervals. The worst counts images that are classified correctly under every attack; "
        f"DeepFool, Carlini-Wagner and HopSkipJump count only with changes of an L2 norm up to {content['l2']:g}:",
        "",
    ]
    lines += [*_accuracy(content), ""]
    if content["skipped"]:
        lines += [_SKIPPED, "", *_skipped(content), ""]
    if content["detection"]:
        lines += ["Detection: how flags and scores tell attacked images from clean ones:", "", *_detection(content), ""]
    if any(content["within"].values()):
        lines += ["Accuracy when the L2 norm of the change is limited:", "", *_within(content), ""]
    if content["certified"]:
        lines += ["Accuracy with a proven L2 radius larger than:", "", *_certified(content), ""]
    lines += ["Cost, and how far the samples differ:", "", *_defences(content), ""]
    if answers := aisvs.answers(content):
        lines += [aisvs.TITLE, "", *table(["requirement", "asks for", "what answers it"], answers), ""]
    if content["training"]:
        lines += ["How the comparators were trained:", "", *_training(content), ""]
    if content["caveats"]:
        lines += ["Caveats:", "", *(f"- {caveat}" for caveat in content["caveats"]), ""]
    return "\n".join(lines)


def _preamble(content: Content) -> str:
    effort = content["budget"]["effort"]
    precision = ", in bf16" if effort["bf16"] else ""
    return (
        f"{content['n']} images of {content['images']}, 8 bits each; budget {content['budget_name']}: gradients of "
        f"{effort['steps']} steps, {effort['restarts']} starts and {effort['draws']} draws at most{precision}, on "
        f"{content['few']} images. Served by {content['runtime']} in {content['precision']}; {conditions(content)}; "
        f"`{content['command']}`."
    )


def _accuracy(content: Content) -> list[str]:
    columns = content["threats"]
    rows = [
        [
            content["defences"][name],
            *_shares(entries, columns),
            f"**{percent(content['worst'][name])}**" if name in content["worst"] else "",
        ]
        for name, entries in content["accuracy"].items()
    ]
    return table(["defence", *columns.values(), "worst"], rows)


_SKIPPED = (
    "Only the worst over all attacks was asked for: an image that one has broken is not attacked by the costly ones to "
    "its right. In their columns it counts as broken, so each says what is left after it and all before it. Images "
    "that were not attacked again:"
)


def _skipped(content: Content) -> list[str]:
    columns = list(dict.fromkeys(column for entries in content["skipped"].values() for column in entries))
    rows = [
        [content["defences"][name], *(entries.get(column, "") for column in columns)]
        for name, entries in content["skipped"].items()
    ]
    return table(["defence", *(content["threats"][column] for column in columns)], rows)


def _detection(content: Content) -> list[str]:
    rows = []
    for name in ("server", "served", "kept"):
        for column, entry in content["detection"].get(name, {}).items():
            found, unnoticed = entry.get("found", {}), entry.get("unnoticed", {})
            rows.append(
                [
                    content["defences"][name],
                    content["threats"][column],
                    content["knows"][column],
                    percent(entry["flagged"]),
                    f"{entry['agreement']:.1%}",
                    f"{entry['auroc']:.3f}" if "auroc" in entry else "",
                    *(percent(found[rate]) if rate in found else "" for rate in ("0.01", "0.05")),
                    percent(unnoticed["0.01"]) if unnoticed else "",
                ]
            )
    head = ["defence", "images", "attacker knows", "flagged", "mean agreement", "AUROC of score"]
    return table([*head, "found at 1 % false alarms", "at 5 %", "misread and not found at 1 %"], rows)


def _within(content: Content) -> list[str]:
    names = list(content["accuracy"])
    rows = [
        [content["threats"][column], f"{entry['l2']:g}", *_shares(entry, names)]
        for column, entries in content["within"].items()
        for entry in entries
    ]
    return table(["attack", "L2 at most", *(content["defences"][name] for name in names)], rows)


def _certified(content: Content) -> list[str]:
    radii = next(iter(content["certified"].values()))
    rows = [[content["defences"][name], *map(percent, row.values())] for name, row in content["certified"].items()]
    return table(["defence", *radii], rows)


def _defences(content: Content) -> list[str]:
    rows = []
    for name, title in content["defences"].items():
        unanimous = _shares(content["unanimous"].get(name, {}), ("clean", "deepfool"))
        rows.append([title, _number(content["cost_ms"], name), _number(content["deviation"], name), *unanimous])
    return table(["defence", "ms per image", "deviation of samples", "all samples right, clean", "attacked"], rows)


def _training(content: Content) -> list[str]:
    rows = []
    for name, about in content["training"].items():
        figures = ", ".join(f"{part} {value:.1%}" for part, value in about.get("held_out", {}).items())
        known = (about.get(key, "") for key in ("step", "seconds", "device"))
        rows.append([content["defences"].get(name, name), *known, figures, about["sha256"][:12]])
    return table(["defence", "steps", "seconds", "device", "held-out training images", "SHA-256"], rows)


def _shares(entries: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """A cell for each of ``names``; nothing in it where that was not measured."""
    return [percent(entries[name]) if name in entries else "" for name in names]


def _number(entries: Mapping[str, float], name: str) -> str:
    return f"{entries[name]:.3g}" if name in entries else ""


def plot(content: Content, path: Path) -> None:
    """Accuracy with intervals, threat by threat; beside it against the size of the change, or by certified radius."""
    colours = {name: f"C{i}" for i, name in enumerate(content["defences"])}  # of matplotlib's cycle
    columns = {**content["threats"], "worst": "the worst of the attacks"}
    entries = {
        column: {name: row[column] for name, row in content["accuracy"].items() if column in row} for column in columns
    }
    entries["worst"] = content["worst"]
    drawn = figure(13, 1.5 + 0.24 * sum(len(rows) + 1 for rows in entries.values()))
    left, right = drawn.subplots(1, 2, width_ratios=[1.25, 1])
    place, ticks = 0, []
    for column, rows in entries.items():
        left.text(0, place, columns[column], fontsize=9, fontweight="bold", va="center")
        for name, entry in rows.items():
            place += 1
            ticks.append((place, content["defences"][name]))
            _point(left, entry, place, colours[name])
        place += 1
    left.set_yticks([where for where, _ in ticks], [name for _, name in ticks], fontsize=8)
    left.set(ylim=(place, -0.7), xlim=(-2, 110), xticks=range(0, 101, 20), xlabel="accuracy, %")
    left.grid(axis="x", alpha=0.25)
    _by_size(right, content, colours)
    drawn.suptitle(f"{content['model']}: {content['n']} images, 95 % intervals", fontsize=11)
    drawn.savefig(path)


def _point(panel: Any, entry: Mapping[str, Any], place: int, colour: str) -> None:
    middle, low, high = (100 * entry[key] for key in ("share", "low", "high"))
    ends = [[max(0.0, middle - low)], [max(0.0, high - middle)]]  # at 0 and 1 an end may be off by a rounding error
    panel.errorbar(middle, place, xerr=ends, fmt="o", color=colour, capsize=3)
    panel.text(103, place, f"{middle:.0f}%", fontsize=8, va="center", color=colour)


def _by_size(panel: Any, content: Content, colours: Mapping[str, str]) -> None:
    """Accuracy by the largest change that attacks without a bound may make, and proven accuracy by radius."""
    lines: list[tuple[str, str, list[tuple[float, Mapping[str, Any]]]]] = []
    for column, bounds in content["within"].items():
        for name, row in content["accuracy"].items():
            points = [(bound["l2"], bound[name]) for bound in bounds if name in bound]
            lines.append((name, f", {content['threats'][column]}", [(0.0, row["clean"]), *points]))
    for name, radii in content["certified"].items():
        lines.append((name, ", proven", [(float(radius), entry) for radius, entry in radii.items()]))
    for name, suffix, points in lines:
        style = {", proven": ":", ", DeepFool": "--"}.get(suffix, "-")
        sizes, shares = [size for size, _ in points], [100 * entry["share"] for _, entry in points]
        label = content["defences"][name] + suffix
        panel.plot(sizes, shares, style, color=colours[name], marker="o", markersize=3, label=label)
    panel.set(ylim=(-3, 103), xlabel="L2 norm of the change, for pixels from 0 to 1", ylabel="accuracy, %")
    panel.grid(alpha=0.25)
    if lines:
        panel.legend(fontsize=7)
