import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from evaluation import aisvs, defences, report, robustness, robustness_report
from evaluation.adaptive import Effort
from evaluation.attacks import predict
from evaluation.budgets import Budget, threats
from evaluation.caveats import caveats
from evaluation.defences import Subject
from evaluation.robustness import Log, measure, summarise
from evaluation.shares import percent, share
from evaluation.threats import COLUMNS, Clean, Record, Target, Threat
from handlers.pipeline import Pipeline
from tests import bundles
from tests.evaluation.models import of_bundle

pytest.importorskip("foolbox")

BUDGET = Budget(Effort(3, 2, 2), 20, 20, 12, 8)
ROWS = ("none", "blur", "served", "kept", "one")
THREATS = ("clean", "noise", "deepfool", "cw", "apgd", "certify")


@pytest.fixture(scope="module")
def subject(nvae_bundle: Path) -> Subject:
    classifier = of_bundle(nvae_bundle)
    return Subject(Pipeline.load(nvae_bundle, runtime="onnxruntime"), classifier, classifier)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return bundles.images(12)


@pytest.fixture(scope="module")
def labels(subject: Subject, images: np.ndarray) -> np.ndarray:
    labels = predict(subject.classifier, images)
    labels[:2] = (labels[:2] + 1) % 3  # misread from the start
    return labels


def _rows(subject: Subject) -> dict[str, defences.Defence]:
    return {name: row for name, row in defences.defences(subject).items() if name in ROWS}


@pytest.fixture(scope="module")
def content(subject: Subject, images: np.ndarray, labels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict:
    rows, all_columns = _rows(subject), threats(BUDGET)
    columns = {name: all_columns[name] for name in THREATS}
    log = Log(tmp_path_factory.mktemp("log") / "log.jsonl")
    cells = measure(subject, rows, columns, images, labels, BUDGET, log)
    content = summarise(cells, rows, columns, 0.5)
    here = {"processor": "a processor", "cores": 2, "python": "3", "packages": {"torch": "2"}}
    about = {"model": "tiny", "n": 12, "few": 8, "images": "signs", "budget_name": "quick", "l2": 0.5, "machine": here}
    about |= {
        "budget": dataclasses.asdict(BUDGET),
        "runtime": "onnxruntime",
        "precision": "fp32",
        "command": "this",
        "training": {},
    }
    return {**content, **about, "caveats": caveats(content, cells)}


def test_shares_of_the_bare_classifier(content: dict) -> None:
    bare = content["accuracy"]["none"]
    assert bare["clean"]["count"] == 10
    assert bare["deepfool"]["count"] == bare["cw"]["count"] == 0
    assert content["engine_agrees"] == 1.0


def test_the_null_of_the_purifier(content: dict, subject: Subject, images: np.ndarray, labels: np.ndarray) -> None:
    kept = subject.pipeline.run(images, samples=1, alphas=[0.0, 0.0])
    copies = subject.pipeline.run(images, samples=5, seeds=range(12))
    one = subject.pipeline.run(images, samples=1, seeds=range(12))
    accuracy = {name: row["clean"]["count"] for name, row in content["accuracy"].items()}
    assert accuracy["kept"] == (kept.labels == labels).sum()
    assert accuracy["one"] == (one.labels == labels).sum()
    assert accuracy["served"] == (copies.labels == labels).sum()
    assert content["deviation"]["kept"] == 0
    assert content["deviation"]["served"] == pytest.approx(copies.purified.std(axis=1).mean(), rel=1e-3)


def test_costly_threats_meet_fewer_images(content: dict) -> None:
    assert {row["certify"]["n"] for row in content["accuracy"].values()} == {8}
    assert {row["apgd"]["n"] for row in content["accuracy"].values()} == {12}


def test_the_worst_is_image_by_image_and_large_changes_do_not_count() -> None:
    def cell(right: list[int], l2: float) -> list[Record]:
        zeros = [0.0] * len(right)
        names = ("flagged", "agreement", "score", "deviation", "unanimous")
        return [{"right": right, "l2": [l2] * len(right), "seconds": 1.0, **dict.fromkeys(names, zeros)}]

    columns = {name: threats(BUDGET)[name] for name in ("clean", "deepfool", "apgd", "white")}
    row = {"served": defences.Defence("served", "served", None, None)}  # type: ignore[arg-type]
    cells = {
        ("served", "clean"): cell([1, 1, 1, 1, 0], 0),
        ("served", "deepfool"): cell([0, 0, 0, 0, 0], 0.6),
        ("served", "apgd"): cell([1, 0, 1, 1, 1], 0.5),
        ("served", "white"): cell([1, 1, 0, 1], 0.5),
    }
    assert summarise(cells, row, columns, 0.5)["worst"]["served"] == share(np.array([True, False, False, True]))
    assert summarise(cells, row, columns, 0.7)["worst"]["served"]["count"] == 0
    del cells["served", "white"]
    assert summarise(cells, row, columns, 0.5)["worst"] == {}  # nothing is said where an attack is missing


@pytest.mark.parametrize(
    ("served", "other", "words"),
    [(50, 48, "no difference"), (80, 20, "60 points better"), (20, 80, "60 points WORSE")],
)
def test_the_conclusion_says_what_it_is(served: int, other: int, words: str) -> None:
    def of(count: int) -> dict:
        return share(np.arange(100) < count)

    worst = {"none": of(0), "blur": of(other), "jpeg": of(0), "served": of(served), "linear": of(100)}
    assert words in robustness.conclusion({"worst": worst, "defences": {"blur": "blur"}})


def test_auroc() -> None:
    assert robustness.auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert robustness.auroc(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert robustness.auroc(np.array([0.0, 2.0, 2.0]), np.array([1.0, 2.0])) == pytest.approx((1 + 2 + 0.5 * 2 - 1) / 6)


def test_bounds_let_large_changes_not_count(content: dict) -> None:
    for method in ("deepfool", "cw"):
        counts = [row["none"]["count"] for row in content["within"][method]]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == 0


def test_proven_accuracy_falls_with_the_radius(content: dict) -> None:
    for radii in content["certified"].values():
        counts = [entry["count"] for entry in radii.values()]
        assert counts == sorted(counts, reverse=True)


class Counting(Clean):
    """Counts what is not in the log yet."""

    runs = 0

    def run(self, target: Target) -> Record:
        type(self).runs += 1
        return super().run(target)


def test_work_goes_on_where_it_was_cut_off(
    subject: Subject, images: np.ndarray, labels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness, "CHUNK", 5)
    rows, log = {name: _rows(subject)[name] for name in ("none", "served")}, Log(tmp_path / "log.jsonl")
    columns: dict[str, Threat] = {"clean": Counting("clean")}

    def again(labels: np.ndarray = labels, **changed: Threat) -> tuple[int, object]:
        Counting.runs = 0
        cells = measure(subject, rows, {**columns, **changed}, images, labels, BUDGET, log)
        return Counting.runs, [{**record, "seconds": 0} for records in cells.values() for record in records]

    runs, first = again()
    assert runs == 6
    assert again() == (0, first)
    torn = log.path.read_bytes().rstrip()
    log.path.write_bytes(torn[:-20])  # the last line is cut off
    assert again() == (1, first)
    assert again() == (0, first)
    cells = [
        json.loads(line) for line in log.path.read_bytes().splitlines() if line.startswith(b"{") and line.endswith(b"}")
    ]
    for record in (None, [1], {"seconds": 1}, *({**cells[0]["record"], name: 1} for name in ("right", "score"))):
        edited = [json.dumps({**cells[0], "record": record}), *map(json.dumps, cells[1:]), "[" * 100_000, "null"]
        log.path.write_text("\n".join(edited), encoding="utf-8")
        assert again() == (1, first)
    assert again(labels=np.roll(labels, 1))[0] == 6  # other labels
    assert again(clean=Counting("clean", 0.1))[0] == 6  # other settings
    assert again() == (0, first)


GRADIENTS = {"zero": {"images": 0.5}, "broken": {"images": 0.0}, "cosine": 0.5}


@pytest.mark.parametrize("threat", ["clean", "white", "certify"])
def test_whatever_is_edited_in_a_record_it_is_measured_again_or_summarised(threat: str) -> None:
    record: Record = {**dict.fromkeys(COLUMNS, (1.0, 0.0)), "agrees": [1, 0], "seconds": 1.0}
    if threat == "white":
        record |= {"draws": 2, "broken": [1, 0], "late": 1, "gradients": GRADIENTS}
    if threat == "certify":
        record = {"right": [1, 0], "radius": [0.5, 0.0], "seconds": 1.0}
    columns, rows = (
        {name: threats(BUDGET)[name] for name in {"clean", threat}},
        {"none": defences.Defence("none", "none", None, None)},
    )  # type: ignore[arg-type]
    clean = {**dict.fromkeys(COLUMNS, (1.0, 0.0)), "seconds": 1.0}
    assert robustness._fits(record, threat, 2)
    values = (None, True, "1", -1, 1e999, [], [1], [1, 2, 3], ["1", "0"], [None, 1], [[1], [2]], {}, {"a": 1}, "[")
    fitting = 0
    for name in [*record, "radius", "met", "gradients", "more", 3]:
        for value in values:
            edited = {**record, name: value}
            without = {key: entry for key, entry in record.items() if key != name}
            for other in (edited, without, {**record, "gradients": {**GRADIENTS, name: value}}):
                if robustness._fits(other, threat, 2):
                    fitting += 1
                    cells = {("none", "clean"): [clean, clean], ("none", threat): [record, other, record]}
                    content = summarise(cells, rows, columns, 0.5)
                    list(caveats(content, cells))
    assert fitting


def test_a_log_that_is_no_file_is_refused_before_the_work(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=f"not a regular file.*{name}"):
            Log(tmp_path / name).read()
    assert Log(tmp_path / "missing").read() == {}


@dataclasses.dataclass(frozen=True)
class Sieve(Threat):
    """An attack that breaks the images whose number ``by`` divides, and notes which it has met."""

    knows = "defence"
    by: int = 1
    costly: bool = True
    l2: float = 0.0
    met: list[int] = dataclasses.field(default_factory=list, repr=False)

    @property
    def is_costly(self) -> bool:  # type: ignore[override]
        return self.costly

    def run(self, target: Target) -> Record:
        self.met.extend(target.places.tolist())
        right = [int(place % self.by != 0) for place in target.places]
        return {**dict.fromkeys(COLUMNS, [0.5] * len(right)), "right": right, "l2": [self.l2] * len(right)}


def test_only_the_worst_is_asked_for_and_what_is_broken_is_spared(
    subject: Subject, images: np.ndarray, labels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness, "CHUNK", 5)
    rows, log, budget = (
        {"none": _rows(subject)["none"]},
        Log(tmp_path / "log.jsonl"),
        dataclasses.replace(BUDGET, few=12),
    )
    columns: dict[str, Threat] = {
        "clean": Clean("clean"),  # 0 and 1 are misread
        "deepfool": Sieve("far", 1, costly=False, l2=0.6),
        "cheap": Sieve("cheap", 4, costly=False),
        "odd": Sieve("costly", 3, l2=0.4),
        "rest": Sieve("costliest", 5),
    }

    def run(**changed: Threat) -> dict:
        return summarise(
            measure(subject, rows, columns | changed, images, labels, budget, log, worst=0.5), rows, columns, 0.5
        )

    content = run()
    met = {name: threat.met for name, threat in columns.items() if isinstance(threat, Sieve)}
    assert met["deepfool"] == met["cheap"] == list(range(12))
    assert met["odd"] == [2, 3, 5, 6, 7, 9, 10, 11]
    assert met["rest"] == [2, 5, 7, 10, 11]
    assert content["skipped"]["none"] == {"odd": 4, "rest": 7}
    assert content["accuracy"]["none"]["rest"] == content["worst"]["none"] == share(np.arange(12) < 3)
    assert content["accuracy"]["none"]["odd"]["count"] == 5
    assert content["detection"]["none"]["odd"]["agreement"] == 0.5
    assert run() == content
    assert met["rest"] == [2, 5, 7, 10, 11]  # the log knows
    assert run(odd=Sieve("breaks all", 1))["skipped"]["none"] == {"odd": 4, "rest": 12}


def test_the_score_is_measured_on_what_the_attack_has_changed() -> None:
    columns = {name: threats(BUDGET)[name] for name in ("clean", "quiet")}
    row = {"served": defences.Defence("served", "served", None, None)}  # type: ignore[arg-type]
    clean = {**dict.fromkeys(COLUMNS, [0.0] * 200), "score": [i / 200 for i in range(200)], "right": [1] * 200}
    attacked = {**dict.fromkeys(COLUMNS, [0.0] * 4), "score": [0.1, 2.0, 0.1, 0.97], "right": [0, 0, 1, 0]}
    cells = {
        ("served", "clean"): [{**clean, "seconds": 1.0}],
        ("served", "quiet"): [{**attacked, "l2": [0.4, 0.4, 0.4, 0]}],
    }
    found = summarise(cells, row, columns, 0.5)["detection"]["served"]["quiet"]
    assert found["found"]["0.01"] == share(np.array([False, True, False]))
    assert found["unnoticed"]["0.01"] == share(np.array([True, False, False]))
    assert found["auroc"] == pytest.approx((20.5 + 200 + 20.5) / 600, abs=1e-4)


def test_figures_are_put_under_the_requirements_that_they_answer(content: dict) -> None:
    answers = {item: said for item, _, said in aisvs.answers(content)}
    assert list(answers) == ["v1.0-C11.1.3", "v1.0-C11.1.4", "v1.0-C11.4.1"]
    assert "DeepFool" in answers["v1.0-C11.1.3"]
    assert percent(content["worst"]["none"]) in answers["v1.0-C11.1.4"]
    assert aisvs.TITLE in robustness_report.markdown(content)
    only = {**content, "accuracy": {"none": content["accuracy"]["none"]}}
    assert aisvs.answers(only) == []


def test_a_report_of_the_worst_says_what_was_skipped(content: dict) -> None:
    asked = {**content, "skipped": {"none": {"certify": 7}}}
    assert "not attacked by the costly ones" in robustness_report.markdown(asked)
    assert "| no defence | 7 |" in robustness_report.markdown(asked)
    assert "not attacked by the costly ones" not in robustness_report.markdown(content)


def test_an_attack_that_only_asks_must_not_break_what_gradients_left(content: dict) -> None:
    accuracy = {"none": {"linf": share(np.arange(100) < 40), "square": share(np.arange(100) < 30)}}
    asked = {**content, "accuracy": accuracy, "skipped": {"none": {"linf": 50, "square": 60}}}
    assert any("breaks 10 of 100 images more" in caveat for caveat in caveats(asked, {}))
    accuracy["none"]["square"] = share(np.arange(100) < 39)
    assert not any("images more" in caveat for caveat in caveats(asked, {}))


def test_the_report_is_written_three_times(content: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "results" / "robustness.json"
    report.save(content, robustness_report.markdown(content), path, lambda file: robustness_report.plot(content, file))
    assert json.loads(path.read_text())["n"] == 12
    text = path.with_suffix(".md").read_text()
    for words in ("Carlini-Wagner", "a processor", "83.3% (55.2-95.3)", "Few images", content["conclusion"]):
        assert words in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in tables]
    assert names[2:7] == list(content["defences"].values())
    widths = {line.count("|") for line in tables if line.startswith("| ---")}
    assert {line.count("|") for line in tables} == widths


def test_models_that_are_not_those_of_the_bundle_are_told(content: dict) -> None:
    assert not any("bundle's models" in caveat for caveat in content["caveats"])
    assert any("bundle's models" in caveat for caveat in caveats({**content, "engine_agrees": 0.9}, {}))
