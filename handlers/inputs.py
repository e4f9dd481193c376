"""The arguments of one `Pipeline.run`, checked: images, seeds, number of samples, alphas and noise."""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from handlers import vote
from handlers.arrays import FloatArray, IntArray
from handlers.errors import InputError
from handlers.manifest import AUTO, Manifest
from handlers.noise import SEED_BITS, fresh_seeds, image_noise, latent_noise

_DRAWERS = 4  # threads, where a GPU computes meanwhile


@dataclass(frozen=True)
class PipelineInputs:
    """Checked inputs of a pipeline. Row b * samples + k of any noise belongs to sample k of image b.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1].
        seeds: one per image, for all noise that is not given.
        samples: purified samples per image, or their maximum with "auto".
        rounds: number of samples of an image after each round; rounds end when its vote is decided.
        alphas: float32 (n,), the effective alphas.
        noise: one float32 (B * samples, *noise_shapes[i]) per latent, or None to draw it.
        input_noise: float32 (B * samples, 3, H, W), or None to draw it.
    """

    images: FloatArray
    seeds: list[int]
    samples: int
    rounds: list[int]
    alphas: FloatArray
    noise: list[FloatArray] | None
    input_noise: FloatArray | None

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        images: npt.ArrayLike,
        samples: int | str | None = None,
        seeds: Sequence[int] | None = None,
        noise: Sequence[npt.ArrayLike] | None = None,
        input_noise: npt.ArrayLike | None = None,
        alphas: str | Sequence[float] | None = None,
    ) -> "PipelineInputs":
        """Check the arguments of `handlers.pipeline.Pipeline.run` against the bundle.

        Raises:
            InputError: an argument is wrong; the message names the first such argument and what it should be.
        """
        batch = checked_images(manifest, images)
        count, rounds = checked_samples(manifest, samples)
        rows, weights = len(batch) * count, _alphas(manifest, alphas)
        if len(rounds) > 1 and not weights.any() and not manifest.input_noise_l2:
            rounds = [1]  # nothing is random, so further samples would be the same
        return cls(
            images=batch,
            seeds=_seeds(seeds, len(batch)),
            samples=count,
            rounds=rounds,
            alphas=weights,
            noise=None if noise is None else _noise(manifest, noise, rows),
            input_noise=None if input_noise is None else _input_noise(manifest, input_noise, rows),
        )

    def draw_each(
        self, manifest: Manifest, parts: Sequence[IntArray], wanted: set[str], ahead: bool
    ) -> Iterator[dict[str, FloatArray]]:
        """As `draw`, for each of ``parts``; with ``ahead``, threads draw the next one already, from this call on."""
        if not ahead:
            return (self.draw(manifest, rows, wanted) for rows in parts)

        def begin(rows: IntArray) -> list[Future[dict[str, FloatArray]]]:
            return [_drawers().submit(self.draw, manifest, rows, {name}) for name in wanted]

        def finish(begun: list[Future[dict[str, FloatArray]]]) -> Iterator[dict[str, FloatArray]]:
            for following in (*parts[1:], None):
                drawn = {name: noise for future in begun for name, noise in future.result().items()}
                begun = [] if following is None else begin(following)
                yield drawn

        return finish(begin(parts[0]))

    def draw(self, manifest: Manifest, rows: IntArray, wanted: set[str]) -> dict[str, FloatArray]:
        """The noise inputs named in ``wanted`` for some rows: sliced from given noise, or drawn."""
        seeds = [self.seeds[row // self.samples] for row in rows]
        samples = [int(row % self.samples) for row in rows]

        def latent(i: int) -> FloatArray:
            if self.noise is not None:
                return self.noise[i][rows]
            if self.alphas[i] == 0:  # multiplied by 0: need not be drawn
                return np.zeros((len(rows), *manifest.noise_shapes[i]), np.float32)
            return latent_noise(seeds, samples, i, manifest.noise_shapes[i])

        drawn: dict[str, FloatArray] = {}
        for name in wanted:
            if name == "input_noise":
                given = self.input_noise
                drawn[name] = image_noise(seeds, samples, manifest.image_size) if given is None else given[rows]
            elif name == "noise":
                drawn[name] = np.stack([latent(i) for i in range(manifest.n_latents)], axis=1)
            else:
                drawn[name] = latent(int(name.removeprefix("noise_")))
        return drawn


@functools.cache
def _drawers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_DRAWERS, "noise")


def checked_images(manifest: Manifest, images: npt.ArrayLike) -> FloatArray:
    """``images``, uint8 (B, H, W, 3) or float (B, 3, H, W) in [0, 1], as float32 (B, 3, H, W).

    Raises:
        InputError: wrong type, shape or range.
    """
    height, width = manifest.image_size
    array = np.asarray(images)
    if array.dtype == np.uint8 and array.ndim == 4 and array.shape[1:] == (height, width, 3) and len(array):
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    if array.dtype.kind == "f" and array.ndim == 4 and array.shape[1:] == (3, height, width) and len(array):
        if not (array.min() >= 0 and array.max() <= 1):  # also refuses NaN
            raise InputError("float images must lie in 0 to 1")
        return np.ascontiguousarray(array, np.float32)
    raise InputError(
        f"images must be uint8 (B, {height}, {width}, 3) or float (B, 3, {height}, {width}), "
        f"not {array.dtype} {array.shape}"
    )


def checked_samples(manifest: Manifest, samples: int | str | None) -> tuple[int, list[int]]:
    """Maximum number of samples per image, and their number after each round; None is the bundle's default.

    Raises:
        InputError: the bundle does not take so many.
    """
    if samples is None:
        samples = manifest.samples.default
    if samples == AUTO:
        return manifest.samples.max, vote.rounds(manifest.samples.max)
    if not isinstance(samples, int | np.integer) or not 1 <= samples <= manifest.samples.max:
        raise InputError(f"samples must be 1 to {manifest.samples.max} or {AUTO!r}, not {samples!r}")
    return int(samples), [int(samples)]


def _seeds(seeds: Sequence[int] | None, count: int) -> list[int]:
    if seeds is None:
        return fresh_seeds(count)
    if len(seeds) != count:
        raise InputError(f"seeds must hold one seed for each of the {count} images, not {len(seeds)}")
    if not all(0 <= seed < 2**SEED_BITS for seed in seeds):
        raise InputError(f"seeds must be 0 to 2^{SEED_BITS} - 1")
    return [int(seed) for seed in seeds]


def _alphas(manifest: Manifest, alphas: str | Sequence[float] | None) -> FloatArray:
    if alphas is None:
        alphas = manifest.default_alphas
    if isinstance(alphas, str):
        if alphas not in manifest.alphas:
            raise InputError(f"alphas must be one of {', '.join(manifest.alphas)}, not {alphas!r}")
        alphas = manifest.alphas[alphas]
    checked = _floats("alphas", alphas, (manifest.n_latents,))
    if not ((checked >= 0) & (checked <= 1)).all():
        raise InputError("alphas must lie in 0 to 1")
    return checked


def _noise(manifest: Manifest, noise: Sequence[npt.ArrayLike], rows: int) -> list[FloatArray]:
    if len(noise) != manifest.n_latents:
        raise InputError(f"noise must hold one array for each of the {manifest.n_latents} latents, not {len(noise)}")
    shapes = [(rows, *shape) for shape in manifest.noise_shapes]
    return [_floats(f"noise[{i}]", given, shape) for i, (given, shape) in enumerate(zip(noise, shapes, strict=True))]


def _input_noise(manifest: Manifest, input_noise: npt.ArrayLike, rows: int) -> FloatArray:
    if manifest.input_noise_l2 == 0:
        raise InputError("this bundle adds no input noise")
    return _floats("input_noise", input_noise, (rows, 3, *manifest.image_size))


def _floats(name: str, given: npt.ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    array = np.ascontiguousarray(given, np.float32)
    if array.shape != shape:
        raise InputError(f"{name} must have shape {shape}, not {array.shape}")
    return array
