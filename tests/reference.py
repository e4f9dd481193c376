"""The published formats and reference outputs in ../shared, for the tests that need full-size models.

The synthetic checkpoints are large: each is built once per run of the tests, in a folder that goes with the process.
"""

import atexit
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from mlvgm.purifier import Purified, Purifier

ROOT = Path(__file__).resolve().parents[2] / "shared" / "reference"


def _module(name: str) -> ModuleType:
    if not ROOT.is_dir():
        pytest.skip("the reference outputs (../shared/reference) are not here")
    # draws.py imports synth.py by its bare name.
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return __import__(name)


def __getattr__(name: str) -> ModuleType:
    # `reference.draws` and `reference.synth`, found only when a test asks.
    if name in ("draws", "synth"):
        return _module(name)
    raise AttributeError(name)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mlvgm-reference-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def manifest(name: str) -> dict[str, Any]:
    """Layout, keys and shapes of a published checkpoint."""
    _module("synth")
    content: dict[str, Any] = json.loads((ROOT / "manifest" / f"{name}.json").read_text())
    return content


def checkpoint(name: str, seed: int = 1) -> Path:
    """Path of the synthetic checkpoint of a manifest, built on first use."""
    path = _folder() / f"{name}-{seed}.pt"
    if not path.exists():
        torch.save(_module("synth").synth_checkpoint(manifest(name), seed), path)
    return path


def release(name: str, seed: int = 1) -> None:
    """Delete a checkpoint that no further test needs: some are gigabytes."""
    (_folder() / f"{name}-{seed}.pt").unlink(missing_ok=True)


def outputs(name: str) -> Any:
    """Arrays of the official modules, such as ``gender_blur_seed1``."""
    _module("draws")
    return np.load(ROOT / "outputs" / f"{name}.npz")


def draws_of(meta: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Every random draw behind an outputs file, by name, from its ``meta``."""
    return {name: _module("draws").gaussian(meta["seed"], name, shape) for name, shape in meta["draws"]}


def comparator_inputs(expected: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Images of an outputs file of A-VAE or ND-VAE, and its draws in order."""
    images = torch.from_numpy(expected["images_u8"].astype(np.float32) / np.float32(255))
    return images, [torch.from_numpy(array) for array in draws_of(json.loads(str(expected["meta"]))).values()]


def relative_error(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected|| in float64; infinite if the shapes differ or a value is not finite."""
    a, b = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def compare(purifier: Purifier, classifier: nn.Module, expected: Any) -> tuple[dict[str, float], Purified]:
    """Purify and classify the images of an outputs file with its own draws.

    Returns:
        The relative error of each stored array that a StyleGAN2 purifier gives, and the purified batch.
    """
    meta = json.loads(str(expected["meta"]))
    draws = {name: torch.from_numpy(array) for name, array in draws_of(meta).items()}
    images = torch.from_numpy(expected["images_u8"].astype(np.float32) / np.float32(255))
    alphas = torch.tensor(meta["interpolation_alphas"]) * meta["alpha_attenuation"]
    purified = purifier.purify(
        images,
        list(draws[f"{meta['set']}.purify.noise"]),
        alphas,
        blur=meta["gaussian_blur_input"],
        input_noise=draws[f"{meta['set']}.input.noise"],
        input_noise_l2=meta["initial_noise_eps"],
    )
    actual = {
        "codes": torch.stack(purified.codes, dim=1),
        "mixed": torch.stack(purified.mixed, dim=1),
        "purified": purified.images,
        "logits": classifier(purified.images),
    }
    return {name: relative_error(value, expected[name]) for name, value in actual.items()}, purified
