"""Caveats of a report: signs that an attack was too weak, or that a figure means less than it seems."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evaluation.robustness import NEAREST, Cells
from evaluation.shares import overlap
from evaluation.threats import FLAT

ENOUGH = 200
"""Images from which on a 95 % interval is at most 7 points wide to either side."""
_STILL = 0.02  # share of the images that late steps, or the last restart, may still win
_FOOLED, _AGREES = 0.99, 0.995


def caveats(content: Mapping[str, Any], cells: Cells) -> list[str]:
    """One sentence each; none for a sound report."""
    found, examined = list(_of_table(content)), set()
    for (row, column), records in ((place, records) for place, records in cells.items() if records):
        where = f"{content['defences'][row]}, {content['threats'][column]}"
        found += [f"{where}: {said}" for said in _of_attack(records)]
        if row not in examined and any("gradients" in record for record in records):
            examined.add(row)  # they do not depend on the set of changes
            found += [f"{content['defences'][row]}: {said}" for said in _of_gradients(records)]
    return found


def _of_table(content: Mapping[str, Any]) -> Iterator[str]:
    accuracy, worst = content["accuracy"], content["worst"]
    fewest = min((entry["n"] for row in accuracy.values() for entry in row.values()), default=0)
    if fewest < ENOUGH:
        yield f"Few images: {fewest} in some cells, where {ENOUGH} would give intervals of 7 points to either side."
    bare = accuracy.get("none", {})
    for column in NEAREST:
        if column in bare and "clean" in bare and bare[column]["share"] > (1 - _FOOLED) * bare["clean"]["share"]:
            yield f"{content['threats'][column]} leaves {bare[column]['share']:.1%} undefended: it is too weak."
    agrees = content.get("engine_agrees")
    if agrees is not None and agrees < _AGREES:
        yield f"Engine and reference agree on only {agrees:.1%} of the clean images: are these the bundle's models?"
    for row, entries in accuracy.items():
        title, skipped = content["defences"][row], content.get("skipped", {}).get(row, {})
        for one, other, said in (
            ("square", "linf", "an attack that only asks beats gradients: these are masked"),
            ("apgd", "white", "an attack that knows the defence is weaker than one that does not"),
        ):
            if one in entries and other in entries and not skipped:
                first, second = entries[one], entries[other]
                # Costly attacks meet fewer images, which may be harder or easier ones.
                same = first["n"] == second["n"] or not overlap(first, second)
                if same and first["share"] < second["share"]:
                    yield f"{title}: {said} ({first['share']:.1%} and {second['share']:.1%} withstand)."
        if "square" in skipped and "linf" in skipped:  # nothing that gradients broke has met it
            total = entries["square"]["n"]
            more = total - skipped["square"] - entries["square"]["count"]
            if more > _STILL * total:
                yield f"{title}: an attack that only asks breaks {more} of {total} images more: gradients are masked."
    served = worst.get("served")
    for row, entry in worst.items():
        if served and row not in ("served", "none", "one") and overlap(served, entry):
            yield f"No difference between the purifier as served and {content['defences'][row]}: intervals overlap."


def _of_gradients(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    records = [record for record in records if "gradients" in record]  # not where all images had been broken before
    seen = [record["gradients"] for record in records]
    for kind, words in (("zero", "are zero"), ("broken", "are not finite")):
        for stage in seen[0][kind]:
            mean = sum(gradients[kind].get(stage, 0.0) for gradients in seen) / len(seen)
            if mean > 0:
                yield f"gradients {words} for {mean:.1%} of the images at what {_TAKES.get(stage, stage)}."
    if (cosine := sum(gradients["cosine"] for gradients in seen) / len(seen)) < FLAT:
        draws = max(record.get("draws", 0) for record in records)
        yield f"two gradients of {draws} draws have a cosine of {cosine:.2f} only: more draws make attacks stronger."


def _of_attack(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    total = sum(len(record["right"]) for record in records)
    late = sum(record.get("late", 0) for record in records)
    if late > _STILL * total:
        yield f"the last quarter of the steps still fooled {late} of {total} images: take more steps."
    restarts = max(len(record.get("broken", ())) for record in records)
    last = sum(record["broken"][-1] for record in records if len(record.get("broken", ())) == restarts > 1)
    if last > _STILL * total:
        yield f"the last restart still fooled {last} of {total} images: take more restarts."


_TAKES = {"images": "comes in", "decode": "the decoder takes", "classify": "the classifier takes"}
