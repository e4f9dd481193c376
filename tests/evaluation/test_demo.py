from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation import contact_sheet, demo
from evaluation.signs import drawn_signs

CLASSES = tuple(f"class {i}" if i != 14 else "stop" for i in range(43))
DEFAULT: Any = SimpleNamespace(recipe=SimpleNamespace(classes=CLASSES))


def _row(true: int, attacked: int, purified: int) -> dict[str, Any]:
    row = {"name": CLASSES[true], "true": true, "clean": true, "clean_purified": true, "clean_flagged": False}
    return {**row, "attacked": attacked, "purified": purified, "agreement": 0.875, "flagged": True, "l2": 0.5}


def _content(stop: dict[str, Any]) -> dict[str, Any]:
    counts = ("images", "clean", "clean_purified", "fooled", "purified", "flagged", "clean_flagged")
    return {"images": [_row(1, 2, 1), stop], "counts": dict.fromkeys(counts, 2)}


@pytest.mark.parametrize(
    ("attacked", "purified", "words"),
    [(3, 14, "stop sign again"), (3, 5, "did not help this time"), (14, 14, "The attack on the stop sign failed")],
)
def test_the_headline_is_honest(attacked: int, purified: int, words: str) -> None:
    assert words in demo.conclusion(DEFAULT, _content(_row(14, attacked, purified)))[0]


def test_the_table_marks_what_went_wrong() -> None:
    lines = demo.table(DEFAULT, [_row(1, 2, 1), _row(1, 2, 2), _row(1, 1, 1)])
    assert "<-" not in lines[1]
    assert lines[2].endswith("not recovered")
    assert lines[3].endswith("the attack failed")


def test_the_contact_sheet_shows_the_pixels_and_colours_the_answers(tmp_path: Path) -> None:
    clean = drawn_signs()[0].image
    attacked = (clean.astype(int) + 2).clip(0, 255).astype(np.uint8)
    row = contact_sheet.Row("stop", clean, attacked, clean, "stop", "priority at next intersection", "stop")
    contact_sheet.save([row] * 3, "a title", tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as picture:
        pixels = np.asarray(picture)
    enlarged = clean.repeat(5, axis=0).repeat(5, axis=1)
    top, left, side = contact_sheet._TOP, contact_sheet._left(0, 0), contact_sheet._SIDE
    assert np.array_equal(pixels[top : top + side, left : left + side], enlarged)
    captions = pixels[top + side : top + side + contact_sheet._CAPTION]
    green, red = contact_sheet._GREEN, contact_sheet._RED
    spans = [slice(contact_sheet._left(0, i), contact_sheet._left(0, i) + side) for i in range(4)]
    assert [(captions[:, span] == green).all(axis=2).any() for span in spans] == [True, False, False, True]
    assert [(captions[:, span] == red).all(axis=2).any() for span in spans] == [False, True, False, False]
