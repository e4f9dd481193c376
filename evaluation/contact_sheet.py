"""Contact sheets of attacked and purified images, one row per image."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from handlers.arrays import Pixels

AMPLIFICATION = 5
CHANGE = f"the change, x{AMPLIFICATION}"

_GREEN, _RED, _INK, _PAPER = (20, 120, 50), (190, 30, 30), (30, 30, 30), (255, 255, 255)
_WIDTH, _GAP, _TOP, _LINE = 1400, 12, 60, 14
_LINES = 2  # of a caption, at most


@dataclass(frozen=True)
class Picture:
    """One picture of a row, uint8 (H, W, 3) or None, and its predicted class, if any."""

    pixels: Pixels | None
    read: str = ""


@dataclass(frozen=True)
class SheetRow:
    """The pictures of one image of class ``true``; ``vote``, if any, is written below the last one."""

    true: str
    pictures: Sequence[Picture]
    vote: str = ""


def change(clean: Pixels, attacked: Pixels) -> Picture:
    """The perturbation of an attack, amplified, on grey."""
    added = AMPLIFICATION * (attacked.astype(np.float32) - clean)
    return Picture((128 + added).clip(0, 255).astype(np.uint8))


def save(rows: Sequence[SheetRow], heads: Sequence[str], title: str, path: Path, columns: int = 2) -> None:
    """Write the sheet as PNG, with ``columns`` rows side by side; correct answers are green, wrong ones red.

    Args:
        heads: of the pictures of each row.
    """
    side = side_of(len(heads), columns)
    height = side + _LINE * _LINES * (2 if any(row.vote for row in rows) else 1) + _GAP
    sheet = Image.new("RGB", (_WIDTH, _TOP + -(-len(rows) // columns) * height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((2 * _GAP, 10), title, fill=_INK, font=ImageFont.load_default(size=18))
    for column in range(min(columns, len(rows))):
        for i, head in enumerate(heads):
            draw.text((left_of(column, i, len(heads), side), 38), head, _INK, ImageFont.load_default(size=13))
    for number, row in enumerate(rows):
        top = _TOP + number // columns * height
        for i, picture in enumerate(row.pictures):
            left = left_of(number % columns, i, len(heads), side)
            if picture.pixels is not None:
                image = Image.fromarray(picture.pixels).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(image, (left, top))
                _caption(draw, picture.read, row.true, (left, top + side), side)
        if row.vote:
            _caption(draw, row.vote, row.true, (left, top + side + _LINES * _LINE), side, "vote: ")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def side_of(pictures: int, columns: int = 2) -> int:
    """Pixels across one of so many ``pictures`` of a row, a multiple of 32, so that ``columns`` rows fill the sheet."""
    return (((_WIDTH - 2 * _GAP) // columns - 2 * _GAP) // pictures - _GAP) // 32 * 32


def left_of(column: int, place: int, pictures: int, side: int) -> int:
    """Where a picture begins."""
    return 2 * _GAP + column * (pictures * (side + _GAP) + 2 * _GAP) + place * (side + _GAP)


def _caption(
    draw: ImageDraw.ImageDraw, read: str, true: str, place: tuple[int, int], side: int, before: str = ""
) -> None:
    lines = textwrap.wrap(before + read, width=side // 6, max_lines=_LINES, placeholder="...")
    colour = _GREEN if read == true else _RED
    draw.multiline_text(place, "\n".join(lines), colour, ImageFont.load_default(size=12), spacing=1)
