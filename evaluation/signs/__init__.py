"""Drawn test pictures without copyright restrictions: fourteen German road signs before sky and foliage, one PNG each.

They look like photographs of a small camera: rotated a little, unevenly lit, blurred and noisy.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from handlers.arrays import Pixels


@dataclass(frozen=True)
class Sign:
    """One sign: its name and its class in the recipe ``road-signs``, and the picture, uint8 (32, 32, 3)."""

    name: str
    label: int
    image: Pixels


def drawn_signs() -> list[Sign]:
    """All of them, by class; a file is called CLASS-NAME.png."""
    signs = []
    for path in sorted(Path(__file__).parent.glob("*.png")):
        label, _, name = path.stem.partition("-")
        with Image.open(path) as picture:
            signs.append(Sign(name.replace("-", " "), int(label), np.asarray(picture)))
    return signs
