from pathlib import Path

import numpy as np
import pytest

from evaluation.gate import Gate
from evaluation.shares import share
from handlers.fields import FieldError


def _of(count: int) -> dict:
    return share(np.arange(100) < count)


CONTENT = {
    "accuracy": {"served": {"clean": _of(95), "deepfool": _of(90)}},
    "worst": {"served": _of(40)},
    "certified": {"served": {"0.25": _of(55)}},
    "detection": {"served": {"clean": {"flagged": _of(3)}, "deepfool": {"found": {"0.01": _of(92)}}}},
}
REACHED = """
clean: 0.95
attacked: {deepfool: 0.9, worst: 0.4}
certified: {0.25: 0.55}
score: {deepfool: 0.9}
flagged: 0.03
"""
MISSED = """
clean: 0.96
attacked: {deepfool: 0.91, worst: 0.41, white: 0.1}
certified: {0.25: 0.56, 0.5: 0}
score: {deepfool: 0.93, cw: 0.1}
flagged: 0.02
"""


def _gate(folder: Path, text: str) -> Gate:
    (folder / "gate.yaml").write_text(text)
    return Gate.read(folder / "gate.yaml")


def test_what_is_reached_passes(tmp_path: Path) -> None:
    assert _gate(tmp_path, REACHED).refusals(CONTENT) == []
    assert _gate(tmp_path, "clean: 0").refusals(CONTENT) == []


def test_what_is_missed_or_not_measured_is_refused_line_by_line(tmp_path: Path) -> None:
    refusals = _gate(tmp_path, MISSED).refusals(CONTENT)
    assert [line.partition(":")[0] for line in refusals] == [
        "clean",
        "deepfool",
        "worst",
        "white",
        "certified at L2 0.25",
        "certified at L2 0.5",
        "score on deepfool",
        "score on cw",
        "clean and not flagged",
    ]
    assert refusals[0] == "clean: 95.0% of 100 images, must be 96.0% at least"
    assert [line for line in refusals if "not measured" in line] == [refusals[i] for i in (3, 5, 7)]
    assert _gate(tmp_path, "defence: other\nclean: 0").refusals(CONTENT) == [
        "clean: not measured, must be 0.0% at least"
    ]


@pytest.mark.parametrize("text", ["clean: 95", "cleen: 0.9", "attacked: [0.9]", "clean: yes", "- 1"])
def test_a_gate_that_cannot_be_meant_is_an_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"gate\.yaml"):
        _gate(tmp_path, text)
