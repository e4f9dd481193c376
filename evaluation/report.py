"""Reports as JSON, as Markdown and as a plot: how any is kept, and what the one on robustness says."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAMES = {
    "clean": "clean",
    "deepfool": "DeepFool",
    "cw": "Carlini-Wagner",
    "none": "none",
    "blur": "blur, sigma 1",
    "noise": "noise, vote of {samples}",
    "purifier": "purifier, vote of {samples}",
}


def write(content: Mapping[str, Any], path: Path) -> None:
    """Keep a report on robustness at ``path``, as `save` does."""
    save(content, markdown(content), lambda file: plot(content, file), path)


def save(content: Mapping[str, Any], text: str, draw: Callable[[Path], None], path: Path) -> None:
    """Write ``content`` to ``path`` as JSON and, beside it under the same name, ``text`` as ``.md`` and a ``.png``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_strict(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(path.with_suffix(".png"))


def _strict(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(content: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [f"# Robustness of {content['model']}", "", _preamble(content), ""]
    lines += ["Images read rightly, with 95 % intervals:", "", *_accuracy(content), ""]
    lines += ["The same when the change may not exceed an L2 norm:", "", *_within(content), ""]
    lines += ["What the attacks did, and how purification tells them:", "", *_attacks(content), ""]
    if "adaptive" in content:
        lines += [*_adaptive(content["adaptive"]), ""]
    if content["doubts"]:
        lines += ["What speaks against these figures:", "", *(f"- {doubt}" for doubt in content["doubts"]), ""]
    return "\n".join(lines)


def _preamble(content: Mapping[str, Any]) -> str:
    here = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    alphas = ", ".join(f"{alpha:g}" for alpha in content["alphas"])
    return (
        f"{content['n']} images of the {content['part']} part, 8 bits each; weights {content['schedule']} ({alphas}); "
        f"noise seeds from {content['seed']}; {content['runtime']}, {content['precision']}; {here['processor']}, "
        f"{here['cores']} cores, Python {here['python']}, {versions}; {content['seconds']:.0f} s."
    )


def _accuracy(content: Mapping[str, Any]) -> list[str]:
    accuracy, samples = content["accuracy"], content["samples"]
    sets = list(accuracy["none"])
    rows = [
        [NAMES[name].format(samples=samples), *(_share(row[key]) for key in sets)] for name, row in accuracy.items()
    ]
    copies = content["copies"]
    rows.append(["purifier, a single copy", *(f"{copies[key]['one']:.1%}" for key in sets)])
    rows.append([f"purifier, all {samples} copies right", *(_share(copies[key]["all"]) for key in sets)])
    return _table(["defence", *(NAMES[key] for key in sets)], rows)


def _within(content: Mapping[str, Any]) -> list[str]:
    rows = [
        [NAMES[method], f"{entry['l2']:g}", *(_share(entry[name]) for name in content["accuracy"])]
        for method, entries in content["within"].items()
        for entry in entries
    ]
    defences = [NAMES[name].format(samples=content["samples"]) for name in content["accuracy"]]
    return _table(["attack", "L2 within", *defences], rows)


def _attacks(content: Mapping[str, Any]) -> list[str]:
    detection = content["detection"]
    rows = [["none", "", "", "", _share(detection["clean"]["flagged"]), f"{detection['clean']['agreement']:.1%}"]]
    for name, entry in content["attacks"].items():
        found = detection[name]
        rows.append(
            [
                NAMES[name],
                _share(entry["fooled"]),
                f"{entry['l2']['0.5']:.3f}",
                _share(content["recovered"][name]),
                _share(found["flagged"]),
                f"{found['agreement']:.1%}",
            ]
        )
    return _table(["attack", "fooled", "median L2", "recovered", "flagged", "mean agreement"], rows)


def _adaptive(entry: Mapping[str, Any]) -> list[str]:
    lines = [
        f"The limit: an attacker who knows the whole defence (projected gradient descent, {entry['steps']} steps, "
        f"gradients averaged over {entry['copies']} copies), on {entry['n']} images:",
        "",
    ]
    rows = [
        [f"{row['l2']:g}", _share(row["none"]), _share(row["transfer"]), _share(row["adaptive"])]
        for row in entry["bounds"]
    ]
    return lines + _table(["L2 within", "no defence", "purifier, classifier attacked", "purifier attacked"], rows)


def _share(entry: Mapping[str, Any]) -> str:
    if entry["share"] is None:
        return "none"
    return f"{entry['share']:.1%} ({100 * entry['low']:.1f}-{100 * entry['high']:.1f})"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Bars of accuracy, one group for each set of images, and lines for the adaptive attack where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    accuracy, samples = content["accuracy"], content["samples"]
    sets = list(accuracy["none"])
    panels = 2 if "adaptive" in content else 1
    figure, axes = plt.subplots(1, panels, figsize=(8 * panels, 4.2), squeeze=False, layout="constrained")
    left = axes[0][0]
    for place, (name, row) in enumerate(accuracy.items()):
        entries = [row[key] for key in sets]
        heights = [100 * entry["share"] for entry in entries]
        errors = [
            [100 * (entry["share"] - entry["low"]) for entry in entries],
            [100 * (entry["high"] - entry["share"]) for entry in entries],
        ]
        places = [i + (place - (len(accuracy) - 1) / 2) * 0.2 for i in range(len(sets))]
        left.bar(places, heights, 0.18, yerr=errors, capsize=2, label=NAMES[name].format(samples=samples))
    left.set_xticks(range(len(sets)), [NAMES[key] for key in sets])
    left.set_ylabel("read rightly, %")
    left.set_title(f"Attacks on the classifier, {content['n']} images")
    left.legend(fontsize=8, loc="upper center", ncols=4)
    if "adaptive" in content:
        right, rows = axes[0][1], content["adaptive"]["bounds"]
        for key, label in (
            ("none", "no defence"),
            ("transfer", "classifier attacked"),
            ("adaptive", "purifier attacked"),
        ):
            right.plot([row["l2"] for row in rows], [100 * row[key]["share"] for row in rows], "o-", label=label)
        right.set_xlabel("L2 norm of the change")
        right.set_title(f"An attacker who knows the defence, {content['adaptive']['n']} images")
        right.legend(fontsize=8, loc="upper center", ncols=3)
    for axis in axes[0]:
        axis.set_ylim(0, 112)
        axis.set_yticks(range(0, 101, 20))
    figure.savefig(path, dpi=140)
    plt.close(figure)
