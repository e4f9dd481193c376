"""Evaluate every defence under every threat, chunk by chunk, and summarise the results.

Each cell, a defence under a threat on a chunk of images, is appended to a log with a key of everything it depends on.
So an interrupted command resumes, and a cell is measured again if anything it depends on has changed.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.adaptive import Gradients
from evaluation.attacks import fingerprint
from evaluation.budgets import Budget
from evaluation.defences import Defence, Subject
from evaluation.progress import bar
from evaluation.shares import overlap, percent, share
from evaluation.threats import COLUMNS, Record, Target, Threat
from handlers.arrays import BoolArray, IntArray, Pixels
from handlers.fields import FieldError, Range, read_strict
from mlvgm.files import open_file

CHUNK = 50
BOUNDS = (0.25, 0.5, 1.0, 2.0)
RADII = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
FALSE_ALARMS = (0.01, 0.05)
NEAREST = ("deepfool", "cw", "hopskipjump")
"""Threats that know no bound: they find the nearest image that is misclassified."""

Cells = Mapping[tuple[str, str], Sequence[Record]]
"""What was found for a defence under a threat, chunk after chunk."""

Found = Mapping[tuple[str, str], dict[str, NDArray[Any]]]
"""The same, with each list joined over the chunks."""


@dataclass(frozen=True)
class Log:
    """The cells in a file, one JSON object a line, each there as a whole or not at all."""

    path: Path

    def read(self) -> dict[str, Record]:
        """The cells by their keys; a line that was cut off or is no cell is left out.

        Raises:
            OSError: it is no file, which would be found out only when the first cell is known.
        """
        cells = dict[str, Record]()
        if not self.path.exists():
            return cells
        with open_file(self.path) as stream:
            for line in stream:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    cell = json.loads(line)
                    cells[cell["key"]] = cell["record"]
        return cells

    def append(self, **cell: Any) -> None:
        """Write one cell to the disk. Several processes may do so."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            # A new line first: what another run was cut off in must not take this cell with it.
            stream.write(b"\n" + json.dumps(cell).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def measure(
    subject: Subject,
    rows: Mapping[str, Defence],
    columns: Mapping[str, Threat],
    images: Pixels,
    labels: IntArray,
    budget: Budget,
    log: Log,
    cache: Path | None = None,
    worst: float | None = None,
) -> dict[tuple[str, str], list[Record]]:
    """All cells, from ``log`` where they are there already.

    Args:
        images: uint8 (N, H, W, 3); those after ``budget.few`` meet transferred attacks only.
        labels: (N,).
        cache: folder for attacks that know the classifier alone.
        worst: only the worst over all attacks is wanted, of changes up to this L2 norm: costly attacks meet only the
            images that the attacks before them, in the order of ``columns``, have left.
    """
    known, identity = log.read(), _identity(subject)
    cells: dict[tuple[str, str], list[Record]] = {(row, column): [] for row in rows for column in columns}
    plan = list(_plan(len(images), rows.values(), columns, budget))
    left: dict[tuple[str, int], BoolArray] = {}
    with bar(sum(size for *_, size in plan), "evaluating") as shown:
        for start, defence, name, size in plan:
            threat, part = columns[name], slice(start, start + size)
            shown.set_description(f"{defence.name}, {name}")
            target = Target(subject, defence, images[part], labels[part], start, cache)
            resisting = left.setdefault((defence.name, start), np.ones(CHUNK, np.bool_))[:size]
            is_spared = worst is not None and threat.is_costly and bool(threat.knows) and not threat.meets_all
            if is_spared:
                target = target.only(np.flatnonzero(resisting))
            what = (identity, start, defence.name, defence.title, defence.digest, threat)
            key = _key(what, target)
            if not _fits(known.get(key), name, len(target.images)) and len(target.images):
                begun = time.monotonic()
                record = threat.run(target)
                known[key] = {**record, "seconds": round(time.monotonic() - begun, 3)}
                log.append(key=key, defence=defence.name, threat=name, first=start, record=known[key])
            record = known[key] if len(target.images) else {"seconds": 0.0}
            cells[defence.name, name].append(_spread(record, resisting) if is_spared else record)
            if worst is not None and (threat.knows or name == "clean"):
                resisting &= _withstood(cells[defence.name, name][-1], name, worst)
            shown.update(size)
    return cells


def _key(what: object, target: Target) -> str:
    parts = (target.images, target.labels, *(() if target.rows is None else (target.rows,)))
    return hashlib.sha256(repr(what).encode() + b"".join(part.tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class _Record:
    """What a log may have of a cell: of each image, and of all (`evaluation.threats`)."""

    seconds: Annotated[float, Range(0.0)]
    right: tuple[float, ...]
    unanimous: tuple[float, ...] = ()
    flagged: tuple[float, ...] = ()
    agreement: tuple[float, ...] = ()
    score: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    l2: tuple[float, ...] = ()
    agrees: tuple[float, ...] = ()
    radius: tuple[float, ...] = ()
    draws: int = 0
    broken: tuple[int, ...] = ()
    late: int = 0
    queries: float = 0.0
    gradients: Gradients = field(default_factory=lambda: Gradients({}, {}, 1.0))


def _fits(record: Any, threat: str, count: int) -> bool:
    """Whether this is a record of so many images: a log may have been edited, or be of another version."""
    try:
        read = read_strict(_Record, record)
    except FieldError:
        return False
    columns = {"right", "radius"} if threat == "certify" else {*COLUMNS, *({"agrees"} & record.keys())}
    return all(len(getattr(read, name)) == (count if name in columns else 0) for name in (*COLUMNS, "agrees", "radius"))


def _spread(record: Record, met: BoolArray) -> Record:
    """A record of some images as one of all: those that it has not ``met`` were broken before."""
    columns = {}
    for name in COLUMNS:
        whole = np.zeros(len(met))
        whole[met] = record.get(name, ())
        columns[name] = whole.tolist()
    return {**record, **columns, "met": met.astype(int).tolist()}


def _withstood(record: Record, threat: str, l2: float) -> BoolArray:
    """(N,): where an attack found nothing, or a change that is larger than allowed."""
    far = np.array(record["l2"]) > l2 if threat in NEAREST else False
    return (np.array(record["right"]) > 0) | far


def _plan(
    count: int, rows: Collection[Defence], columns: Mapping[str, Threat], budget: Budget
) -> Iterator[tuple[int, Defence, str, int]]:
    """Chunk after chunk, so that whatever ends the run, all cells have about as many images."""
    for start in range(0, count, CHUNK):
        for name, threat in columns.items():
            size = min(CHUNK, (min(count, budget.few) if threat.is_costly else count) - start)
            for defence in rows if size > 0 else ():
                yield start, defence, name, size


def _identity(subject: Subject) -> str:
    """Whatever an answer depends on beside the images, the defence and the threat."""
    manifest = subject.pipeline.manifest
    files = sorted((name, digest.sha256) for name, digest in manifest.files.items())
    settings = (manifest.alphas, manifest.samples, manifest.input_noise_l2, manifest.precision, manifest.batch)
    models = [fingerprint(model, "") for model in (subject.purifier, subject.classifier)]
    return repr((files, settings, subject.pipeline.runtime, subject.blur, models))


def summarise(cells: Cells, rows: Mapping[str, Defence], columns: Mapping[str, Threat], l2: float) -> dict[str, Any]:
    """What a report says of the cells, as JSON.

    Args:
        l2: norm of the largest change that counts for the worst of attacks that find the nearest image; where they
            need more, the attacker sends the clean image.

    Returns:
        "defences" and "threats", name -> title; "skipped", by defence and threat how many images had been broken before
        and were not attacked again; "trained", the names of trained comparators; by defence and threat
        "accuracy", "unanimous" and "detection"; by defence "worst", the images that withstand every attack,
        "deviation", "cost_ms" and "certified"; by threat of `NEAREST` "within", for some bounds, by defence; and
        "conclusion".
    """
    found = {place: _joined(records) for place, records in cells.items() if records}
    attacks = [name for name, threat in columns.items() if threat.knows]
    content: dict[str, Any] = {
        "defences": {name: row.title for name, row in rows.items()},
        "trained": [name for name, row in rows.items() if row.digest],
        "threats": {name: column.title for name, column in columns.items()},
        "knows": {name: column.knows for name, column in columns.items()},
        "accuracy": _by_place(found, lambda cell: share(cell["right"] > 0)),
        "skipped": _by_place(found, lambda cell: int((cell["met"] == 0).sum()), "met"),
        "worst": {row: share(worst) for row in rows if (worst := _worst(found, row, attacks, l2)) is not None},
        "unanimous": _by_place(found, lambda cell: share(cell["unanimous"] > 0), "unanimous"),
        "deviation": {row: float(found[row, "clean"]["deviation"].mean()) for row in rows if (row, "clean") in found},
        "cost_ms": {row: _milliseconds(cells[row, "clean"]) for row in rows if cells.get((row, "clean"))},
        "detection": {row: _detection(found, row, attacks) for row in rows if (row, "clean") in found},
        "within": {
            column: [{"l2": bound, **_within(found, rows, column, bound)} for bound in BOUNDS]
            for column in NEAREST
            if {column, "clean"} <= columns.keys() and not any("met" in found.get((row, column), ()) for row in rows)
        },
        "certified": {
            row: {str(radius): share(cell["radius"] > radius) for radius in RADII}
            for (row, column), cell in found.items()
            if column == "certify"
        },
    }
    if "agrees" in found.get(("none", "clean"), ()):
        content["engine_agrees"] = _mean(found["none", "clean"]["agrees"])
    return content | {"conclusion": conclusion(content)}


def conclusion(content: Mapping[str, Any]) -> str:
    """Whether the purifier as served withstands more than the best of the simple defences, and what the best of the
    trained comparators does.
    """
    worst, titles = content["worst"], content["defences"]
    served = next((row for row in ("server", "served") if row in worst), None)
    others = {row: entry for row, entry in worst.items() if row in ("blur", "noise", "jpeg", "bits", "kept")}
    trained = [row for row in content.get("trained", ()) if row in worst]
    last = ""
    if trained:
        most = max(trained, key=lambda row: worst[row]["share"])
        last = f" Of what was trained to compare with, {titles[most]} withstands most: {percent(worst[most], 0)}."
    if served is None:
        return f"No attack was measured on the purifier as served.{last}"
    said = f"Of {worst[served]['n']} images, {percent(worst[served], 0)} withstand every attack behind the purifier"
    if not others:
        return f"{said}.{last}"
    best = max(others, key=lambda row: others[row]["share"])
    said += f", {percent(others[best], 0)} behind {titles[best]}"
    gain = 100 * (worst[served]["share"] - others[best]["share"])
    if overlap(worst[served], others[best]):
        return f"{said}: no difference.{last}"
    return f"{said}: the purifier is {abs(gain):.0f} points {'better' if gain > 0 else 'WORSE'}.{last}"


def auroc(clean: NDArray[Any], attacked: NDArray[Any]) -> float:
    """The probability that an attacked image scores above a clean one, equal scores counting half."""
    above = (attacked[:, None] > clean).mean() + (attacked[:, None] == clean).mean() / 2
    return round(float(above), 4)


def _joined(records: Sequence[Record]) -> dict[str, NDArray[Any]]:
    """The columns of all chunks."""
    names = [name for name in (*COLUMNS, "agrees", "radius", "met") if all(name in record for record in records)]
    return {name: np.concatenate([record[name] for record in records]) for name in names}


def _by_place(
    found: Found, entry: Callable[[dict[str, NDArray[Any]]], Any], needs: str = "right"
) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for (row, column), cell in found.items():
        if needs in cell:
            table.setdefault(row, {})[column] = entry(cell)
    return table


def _worst(found: Found, row: str, attacks: Sequence[str], l2: float) -> BoolArray | None:
    """(N,), whether an image is classified correctly under all attacks; of the images that met all.

    A misclassified clean image counts as misclassified under attack. None if an attack is missing.
    """
    if not attacks or any((row, column) not in found for column in ("clean", *attacks)):
        return None
    columns = [_right(found, row, column, l2) for column in ("clean", *attacks)]
    count = min(map(len, columns))
    return np.logical_and.reduce([column[:count] for column in columns])


def _right(found: Found, row: str, column: str, bound: float) -> BoolArray:
    """(N,), whether an image is classified correctly; an attack of `NEAREST` sends the clean one beyond ``bound``."""
    cell = found[row, column]
    right: BoolArray = cell["right"] > 0
    if column in NEAREST:
        clean = found[row, "clean"]["right"][: len(right)] > 0
        right = np.where(cell["l2"] <= bound, right, clean)
    return right


def _milliseconds(records: Sequence[Record]) -> float:
    """Per clean image; the first chunk, which is slow, counts only where there is no other."""
    counted = records[1:] or records
    return round(1000 * sum(r["seconds"] for r in counted) / sum(len(r["right"]) for r in counted), 3)


def _detection(found: Found, row: str, attacks: Sequence[str]) -> dict[str, Any]:
    """How well scores and flags tell the images that attacks have changed from clean ones."""
    clean = found[row, "clean"]
    table: dict[str, Any] = {"clean": {"flagged": share(clean["flagged"] > 0), "agreement": _mean(clean["agreement"])}}
    for name in attacks:
        if (cell := found.get((row, name))) is None or not (changed := cell["l2"] > 0).any():
            continue
        scores = cell["score"][changed]
        limits = {rate: np.quantile(clean["score"], 1 - rate, method="higher") for rate in FALSE_ALARMS}
        misread = (cell["right"] == 0)[changed]
        table[name] = {
            "flagged": share(cell["flagged"][changed] > 0),
            "agreement": _mean(cell["agreement"][changed]),
            "auroc": auroc(clean["score"], scores),
            "found": {str(rate): share(scores > limit) for rate, limit in limits.items()},
            "unnoticed": {str(rate): share(misread & (scores <= limit)) for rate, limit in limits.items()},
        }
    return table


def _mean(column: NDArray[Any]) -> float:
    return round(float(column.mean()), 4)


def _within(found: Found, rows: Collection[str], column: str, bound: float) -> Record:
    """Accuracy against an attacker who may make changes up to ``bound`` only, by defence."""
    measured = [row for row in rows if (row, column) in found and (row, "clean") in found]
    return {row: share(_right(found, row, column, bound)) for row in measured}
