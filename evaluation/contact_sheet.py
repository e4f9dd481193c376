"""A picture of what an attack does and what purification makes of it, one row per image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

AMPLIFICATION = 5

_GREEN, _RED, _INK, _PAPER = (20, 120, 50), (190, 30, 30), (30, 30, 30), (255, 255, 255)
_SIDE, _GAP, _CAPTION, _TOP = 160, 12, 40, 60


@dataclass(frozen=True)
class Row:
    """One image: clean, attacked and, if it was, purified, uint8 (H, W, 3), and what it was read as each time."""

    true: str
    clean: NDArray[np.uint8]
    attacked: NDArray[np.uint8]
    purified: NDArray[np.uint8] | None
    read_clean: str
    read_attacked: str
    read_purified: str


def save(rows: Sequence[Row], title: str, path: Path, columns: int = 2) -> None:
    """Write the sheet as PNG, with ``columns`` rows side by side; right answers are green and wrong ones red."""
    lines = -(-len(rows) // columns)
    width = columns * 4 * (_SIDE + _GAP) + (columns + 1) * 2 * _GAP
    sheet = Image.new("RGB", (width, _TOP + lines * (_SIDE + _CAPTION + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((2 * _GAP, 10), title, fill=_INK, font=ImageFont.load_default(size=18))
    heads = ("clean", "attacked", f"the change, x{AMPLIFICATION}", "purified")
    for column in range(min(columns, len(rows))):
        for i, head in enumerate(heads):
            draw.text((_left(column, i), 38), head, fill=_INK, font=ImageFont.load_default(size=15))
    for number, row in enumerate(rows):
        column, line = number % columns, number // columns
        _paste(sheet, row, column, _TOP + line * (_SIDE + _CAPTION + _GAP))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _paste(sheet: Image.Image, row: Row, column: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    change = row.attacked.astype(np.float32) - row.clean
    pictures = (row.clean, row.attacked, (128 + AMPLIFICATION * change).clip(0, 255).astype(np.uint8), row.purified)
    captions = (row.read_clean, row.read_attacked, "", row.read_purified)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        if picture is None:
            continue
        left = _left(column, i)
        sheet.paste(Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, top))
        colour = _GREEN if caption == row.true else _RED
        draw.multiline_text(
            (left, top + _SIDE + 2), _wrapped(caption), colour, ImageFont.load_default(size=14), spacing=1
        )


def _left(column: int, place: int) -> int:
    return 2 * _GAP + column * (4 * (_SIDE + _GAP) + 2 * _GAP) + place * (_SIDE + _GAP)


def _wrapped(caption: str, width: int = 22) -> str:
    """At most two lines, broken at a space."""
    if len(caption) <= width:
        return caption
    cut = caption.rfind(" ", 0, width + 1)
    return f"{caption[:cut]}\n{caption[cut + 1 :]}" if cut > 0 else caption
