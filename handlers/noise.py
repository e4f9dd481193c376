"""Counter-based noise: the noise for (seed, sample, latent) is always the same, whatever else is in the batch.

Philox is a keyed counter: the seed is the key; the latent, the sample and the stream number are words of the counter.
So any part of the noise can be drawn separately, in any order, on any machine.
"""

import secrets
from collections.abc import Sequence

import numpy as np

from handlers.arrays import FloatArray

SEED_BITS = 63
_LATENT_STREAM, _INPUT_STREAM = 0, 1


def fresh_seeds(count: int) -> list[int]:
    """``count`` seeds from the operating system: an attacker can neither choose nor predict the noise."""
    return [secrets.randbits(SEED_BITS) for _ in range(count)]


def fresh_generator() -> np.random.Generator:
    """A generator whose key comes from the operating system; what it draws cannot be repeated."""
    return np.random.Generator(np.random.Philox(key=secrets.randbits(128)))


def latent_noise(seeds: Sequence[int], samples: Sequence[int], latent: int, shape: Sequence[int]) -> FloatArray:
    """Standard-normal noise of one latent, (R, *shape); row r is that of ``seeds[r]`` and sample ``samples[r]``."""
    return _normal(seeds, samples, latent, _LATENT_STREAM, shape)


def image_noise(seeds: Sequence[int], samples: Sequence[int], image_size: Sequence[int]) -> FloatArray:
    """Standard-normal input noise, (R, 3, H, W), from a stream of its own."""
    return _normal(seeds, samples, 0, _INPUT_STREAM, (3, *image_size))


def _normal(seeds: Sequence[int], samples: Sequence[int], latent: int, stream: int, shape: Sequence[int]) -> FloatArray:
    out = np.empty((len(seeds), *shape), np.float32)
    bits = np.random.Philox(0)
    generator = np.random.Generator(bits)
    state = bits.state  # setting its state is several times cheaper than one generator per row
    for row, seed, sample in zip(out, seeds, samples, strict=True):
        state["state"] = {
            "counter": np.array([0, latent, sample, stream], np.uint64),
            "key": np.array([seed, 0], np.uint64),
        }
        bits.state = state
        generator.standard_normal(dtype=np.float32, out=row)
    return out
