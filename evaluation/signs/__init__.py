"""Fourteen German road signs in front of sky and foliage, one PNG each: test pictures that anyone may have.

They are drawn, not photographed, and look as a small camera would see them: turned a little, lit, blurred and noisy.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Sign:
    """One sign: its name and its class in the recipe ``road-signs``, and the picture, uint8 (32, 32, 3)."""

    name: str
    label: int
    image: NDArray[np.uint8]


def drawn_signs() -> list[Sign]:
    """All of them, by class; a file is called CLASS-NAME.png."""
    signs = []
    for path in sorted(Path(__file__).parent.glob("*.png")):
        label, _, name = path.stem.partition("-")
        with Image.open(path) as picture:
            signs.append(Sign(name.replace("-", " "), int(label), np.asarray(picture)))
    return signs
