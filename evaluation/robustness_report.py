"""The report of `evaluation.robustness` as Markdown and as a plot."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evaluation.report import Content, conditions, figure, share, table

NAMES = {
    "clean": "clean",
    "deepfool": "DeepFool",
    "cw": "Carlini-Wagner",
    "none": "no defence",
    "blur": "blur, sigma 1",
    "noise": "noise, vote of {samples}",
    "kept": "nothing resampled (all alphas 0)",
    "one": "{schedule} schedule, one sample",
    "purifier": "{schedule} schedule, vote of {samples}",
    "linear": "linear schedule, vote of {samples}",
}
_COLOURS = {
    "none": "#8a8a8a",
    "blur": "#d9a441",
    "noise": "#5a9a6a",
    "kept": "#7d5fa8",
    "one": "#86aedb",
    "purifier": "#2f6db0",
    "linear": "#3a9a9a",
}
_RED = "#b0362a"


def markdown(content: Content) -> str:
    """The page."""
    lines = [f"# Robustness of {content['model']}", "", _preamble(content), ""]
    lines += ["Accuracy with 95 % intervals:", "", *_accuracy(content), ""]
    lines += ["Accuracy when the change may not exceed an L2 norm:", "", *_within(content), ""]
    lines += ["How often the attacks succeed, and how purification detects them:", "", *_attacks(content), ""]
    if "noise" in content:
        lines += [*_noise(content["noise"]), ""]
    if "adaptive" in content:
        lines += [*_adaptive(content["adaptive"]), ""]
    if content["caveats"]:
        lines += ["Caveats:", "", *(f"- {caveat}" for caveat in content["caveats"]), ""]
    return "\n".join(lines)


def _preamble(content: Content) -> str:
    alphas = ", ".join(f"{alpha:g}" for alpha in content["alphas"])
    deviation = f"{content['sample_deviation']:.4f} (standard deviation for pixels from 0 to 1, mean over pixels)"
    return (
        f"{content['n']} images of the {content['part']} part, 8 bits each; alphas {content['schedule']} ({alphas}); "
        f"purified samples of a clean image deviate by {deviation}; noise seeds from {content['seed']}; "
        f"{content['runtime']}, {content['precision']}; {conditions(content)}; "
        f"{content['seconds']:.0f} s."
    )


def _accuracy(content: Content) -> list[str]:
    accuracy = content["accuracy"]
    sets = list(accuracy["none"])
    rows = [[_name(content, name), *(share(row[key]) for key in sets)] for name, row in accuracy.items()]
    unanimous = f"{_schedule(content)} schedule, all {content['samples']} samples right"
    rows.append([unanimous, *(share(content["per_sample"][key]["all"]) for key in sets)])
    return table(["defence", *(NAMES[key] for key in sets)], rows)


def _within(content: Content) -> list[str]:
    rows = [
        [NAMES[method], f"{entry['l2']:g}", *(share(entry[name]) for name in content["accuracy"])]
        for method, entries in content["within"].items()
        for entry in entries
    ]
    defences = [_name(content, name) for name in content["accuracy"]]
    return table(["attack", "L2 at most", *defences], rows)


def _attacks(content: Content) -> list[str]:
    detection = content["detection"]
    rows = [["none", "", "", "", share(detection["clean"]["flagged"]), f"{detection['clean']['agreement']:.1%}"]]
    for name, entry in content["attacks"].items():
        found = detection[name]
        rows.append(
            [
                NAMES[name],
                share(entry["fooled"]),
                f"{entry['l2']['0.5']:.3f}",
                share(content["recovered"][name]),
                share(found["flagged"]),
                f"{found['agreement']:.1%}",
            ]
        )
    return table(["attack", "fooled", "median L2", "recovered", "flagged", "mean agreement"], rows)


def _name(content: Content, defence: str) -> str:
    return NAMES[defence].format(samples=content["samples"], schedule=_schedule(content))


def _schedule(content: Content) -> str:
    """The name of the measured schedule, which need not be the served one."""
    return "served" if content["served"] else str(content["schedule"])


def _noise(entry: Mapping[str, Any]) -> list[str]:
    """On the left one noisy image, on the right a vote of many noisy versions of one image."""
    lines = [f"Gaussian noise on {entry['n']} clean images, by its standard deviation for pixels from 0 to 1:", ""]
    draws = entry["draws"]
    header = [
        "deviation",
        "one noisy image, no defence",
        f"one noisy image, {entry['samples']} purified samples",
        f"vote of {draws} noisy images, no defence",
        f"vote of {draws} noisy images, one purified sample each",
    ]
    rows = [
        [f"{row['sigma']:g}", *(share(row[key]) for key in ("none", "purified", "vote_none", "vote"))]
        for row in entry["sigmas"]
    ]
    return lines + table(header, rows)


def _adaptive(entry: Mapping[str, Any]) -> list[str]:
    lines = [
        f"**An attacker who knows the whole defence** (projected gradient descent, {entry['steps']} steps, gradients "
        f"averaged over {entry['samples']} samples), on {entry['n']} images:",
        "",
    ]
    rows = [
        [f"{row['l2']:g}", share(row["none"]), share(row["transfer"]), f"**{share(row['adaptive'])}**"]
        for row in entry["bounds"]
    ]
    return lines + table(["L2 at most", "no defence", "purifier, classifier attacked", "purifier attacked"], rows)


def plot(content: Content, path: Path) -> None:
    """Accuracy with intervals: on the left each attack and defence, on the right against the size of the change."""
    groups = list(_groups(content))
    lines = sum(len(rows) + 1 for _, rows in groups)
    drawn = figure(13, 1.2 + 0.27 * lines)
    left, right = drawn.subplots(1, 2, width_ratios=[1.25, 1])
    place = 0
    ticks: list[tuple[int, str]] = []
    for title, rows in groups:
        left.text(0, place, title, fontsize=9, fontweight="bold", va="center")
        for name, entry, colour in rows:
            place += 1
            ticks.append((place, name))
            _point(left, 100 * entry["share"], place, entry, colour, across=True)
            left.text(103, place, f"{entry['share']:.0%}", fontsize=8, va="center", color=colour)
        place += 1
    left.set_yticks([where for where, _ in ticks], [name for _, name in ticks], fontsize=8)
    left.set_ylim(place, -0.7)
    left.set_xlim(-2, 110)
    left.set_xticks(range(0, 101, 20))
    left.grid(axis="x", alpha=0.25)
    left.set_xlabel("accuracy, %")
    _by_size(right, content)
    drawn.suptitle(f"{content['model']}: {content['n']} images, 95 % intervals", fontsize=11)
    drawn.savefig(path)


def _groups(content: Content) -> Iterator[tuple[str, list[tuple[str, Mapping[str, Any], str]]]]:
    """For each attack its title and, one a line, defence, share and colour."""
    accuracy = content["accuracy"]
    for key in accuracy["none"]:
        title = "no attack" if key == "clean" else f"{NAMES[key]}, which knows the classifier alone"
        yield title, [(_name(content, name), row[key], _COLOURS[name]) for name, row in accuracy.items()]
    adaptive = content.get("adaptive", {"bounds": []})
    for row in adaptive["bounds"]:
        yield (
            f"PGD with L2 at most {row['l2']:g}, {adaptive['n']} images",
            [
                ("no defence", row["none"], _COLOURS["none"]),
                ("purifier, unknown to the attacker", row["transfer"], _COLOURS["purifier"]),
                ("purifier, known to the attacker", row["adaptive"], _RED),
            ],
        )


def _by_size(panel: Any, content: Content) -> None:
    """Accuracy against the largest change that the attacker may make; 0 is the clean image."""
    accuracy = content["accuracy"]
    styles = {"deepfool": "--", "cw": "-"}
    for method, entries in content["within"].items():
        for name in ("none", "purifier"):
            points = [(0.0, accuracy[name]["clean"]), *((entry["l2"], entry[name]) for entry in entries)]
            sizes = [size for size, _ in points]
            panel.plot(
                sizes,
                [100 * entry["share"] for _, entry in points],
                styles[method],
                color=_COLOURS[name],
                marker="o",
                markersize=3,
                label=f"{_name(content, name)}, {NAMES[method]}",
            )
            panel.fill_between(
                sizes,
                *([100 * entry[end] for _, entry in points] for end in ("low", "high")),
                color=_COLOURS[name],
                alpha=0.2,
            )
    labelled = {
        "none": ("no defence, PGD", _COLOURS["none"]),
        "transfer": ("purifier, PGD on the classifier", _COLOURS["purifier"]),
        "adaptive": ("purifier, PGD that knows it", _RED),
    }
    for row in content.get("adaptive", {"bounds": []})["bounds"]:
        for key, (label, colour) in labelled.items():
            _point(panel, row["l2"], 100 * row[key]["share"], row[key], colour, across=False, label=label)
        labelled = {key: ("", colour) for key, (_, colour) in labelled.items()}
    panel.set_ylim(-3, 103)
    panel.set_xlim(left=-0.03)
    panel.grid(alpha=0.25)
    panel.set_xlabel("L2 norm of the change at most, for pixels from 0 to 1")
    panel.set_ylabel("accuracy, %")
    panel.legend(fontsize=8, loc="center right")


def _point(
    panel: Any, x: float, y: float, entry: Mapping[str, Any], colour: str, across: bool, label: str = ""
) -> None:
    """A share with its interval as a whisker, across or upright."""
    low, high = entry["share"] - entry["low"], entry["high"] - entry["share"]
    ends = [[100 * max(0.0, low)], [100 * max(0.0, high)]]  # at 0 and 1, an end may be off by a rounding error
    bars = {"xerr" if across else "yerr": ends}
    panel.errorbar(x, y, **bars, fmt="o" if across else "s", color=colour, capsize=3, label=label)
