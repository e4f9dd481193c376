"""A contact sheet: for each sign the clean picture, the attacked one, the change, and the purified one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, CAPTION, HEAD = 128, 12, 22, 44
AMPLIFICATION = 8
GREEN, RED, INK, PAPER = (20, 120, 50), (180, 20, 30), (30, 30, 34), (252, 252, 250)
HEADS = ("clean", "attacked", f"the change, x{AMPLIFICATION}", "purified")


@dataclass(frozen=True)
class Row:
    """One sign: uint8 (H, W, 3) pictures, clean, attacked and purified, and how each is read: (name, rightly?)."""

    pictures: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]
    answers: Sequence[tuple[str, bool]]


def draw_sheet(rows: Sequence[Row], columns: int = 2) -> Image.Image:
    """All rows, ``columns`` signs side by side; answers are green where right and red where wrong."""
    strip, tall = 4 * (SIDE + GAP) + 2 * GAP, SIDE + CAPTION + GAP
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * strip, HEAD + lines * tall + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    head, small = ImageFont.load_default(size=17), ImageFont.load_default(size=13)
    for column in range(columns):
        for i, text in enumerate(HEADS):
            pen.text((column * strip + GAP + i * (SIDE + GAP), 14), text, INK, head)
    for place, row in enumerate(rows):
        left, top = place % columns * strip + GAP, HEAD + place // columns * tall
        clean, attacked, purified = row.pictures
        answers = [row.answers[0], row.answers[1], None, row.answers[2]]
        for i, (picture, answer) in enumerate(
            zip((clean, attacked, _change(clean, attacked), purified), answers, strict=True)
        ):
            x = left + i * (SIDE + GAP)
            sheet.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, top))
            if answer is not None:
                pen.text((x, top + SIDE + 3), _fitting(answer[0], small, pen), GREEN if answer[1] else RED, small)
    return sheet


def _change(clean: NDArray[np.uint8], attacked: NDArray[np.uint8]) -> NDArray[np.uint8]:
    difference = attacked.astype(np.int16) - clean.astype(np.int16)
    return np.clip(128 + AMPLIFICATION * difference, 0, 255).astype(np.uint8)


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, pen: ImageDraw.ImageDraw) -> str:
    """``text``, shortened until it is no wider than a picture and its gap."""
    if pen.textlength(text, font) <= SIDE + GAP - 4:
        return text
    while text and pen.textlength(text + "...", font) > SIDE + GAP - 4:
        text = text[:-1]
    return text.rstrip() + "..."
