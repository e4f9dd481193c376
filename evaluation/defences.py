"""Defences: the purifier as it is served, its ablations, the classifier alone, and simple baselines.

Each has two implementations: ``serve`` classifies 8-bit images with the served engines and decides the results;
``forward`` computes the same with PyTorch, for the gradients of attacks.
"""

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from evaluation.adaptive import Forward, Trace
from evaluation.attacks import to_bytes, to_float
from evaluation.differentiable import Differentiable
from evaluation.photographs import encode
from export.fold import fast
from handlers.arrays import BoolArray, FloatArray, IntArray, Pixels
from handlers.client import Client
from handlers.pipeline import Pipeline
from handlers.result import Result
from mlvgm.preprocess import add_noise, blur_images, gaussian_taps
from mlvgm.purifier import Purifier

Seeds = Sequence[int]

NOISE_L2 = 1.0
"""L2 norm of the noise defence, for images in [0, 1]: half of that in the paper's ablation at 64x64."""

JPEG_QUALITY, BITS = 75, 3

_CHUNK = 64


@dataclass(frozen=True)
class Predictions:
    """The predictions of a defence for N images.

    Attributes:
        labels: (N,), the predicted classes.
        sample_labels: (N, S), the class of each of up to S purified or noisy samples, the voters; -1 for none.
        logits: (N, C), their mean, or the logarithms of the confidences.
        flagged: (N,), whether it differs from the bare classifier.
        scores: (N,), how suspicious each image is (`handlers.result.Result.scores`); 0 for defences that do not say.
        deviation: (N,), how far purified samples differ: their standard deviation, mean over the pixels.
    """

    labels: IntArray
    sample_labels: IntArray
    logits: FloatArray
    flagged: BoolArray
    scores: FloatArray
    deviation: FloatArray

    @classmethod
    def of(cls, sample_logits: FloatArray, before: FloatArray, deviation: FloatArray | float = 0.0) -> "Predictions":
        """From the logits (N, S, C) of the samples, NaN for none, and those of the images as they came, (N, C)."""
        result = Result(sample_logits, sample_logits, before, {})
        spread = np.broadcast_to(np.float32(deviation), len(before))
        return cls(result.labels, result.sample_labels, result.logits, result.flagged, result.scores, spread)

    @property
    def agreement(self) -> NDArray[np.float64]:
        """(N,): share of the samples that vote for the predicted class."""
        drawn = self.sample_labels >= 0
        return ((self.sample_labels == self.labels[:, None]) & drawn).sum(1) / drawn.sum(1)


Serve = Callable[[Pixels, Seeds], Predictions]
"""Images uint8 (N, H, W, 3), and for each a seed of its noise."""


@dataclass(frozen=True)
class Defence:
    """One row: see the top of this file.

    Attributes:
        name: by which it is chosen.
        title: as the report says it; also says all settings.
        is_random: whether it draws noise.
        classifier: the one that attackers know who know the classifier alone; None for the subject's.
        digest: of weights that are not the subject's.
        seeded: ``forward`` with the noise that ``serve`` draws from seeds; None where it draws none, or another.
    """

    name: str
    title: str
    serve: Serve
    forward: Forward
    is_random: bool = False
    classifier: nn.Module | None = None
    digest: str = ""
    seeded: Callable[[Tensor, int, Seeds], Trace] | None = None


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a bundle as it is served, and the models that it was made from.

    Attributes:
        blur: whether the bundle blurs its input.
        device: where gradients are taken. Attacks keep images and logits on the CPU, where the engines judge them.
    """

    pipeline: Pipeline
    purifier: Purifier
    classifier: nn.Module
    blur: bool = False
    device: str = "cpu"

    @cached_property
    def fast_classifier(self) -> nn.Module:
        """`fast` of the classifier."""
        return fast(self.classifier, self.device)


def defences(subject: Subject, samples: int | str | None = None, served: str | None = None) -> dict[str, Defence]:
    """All rows for a bundle by name, in the order of a report: also each schedule of the bundle that is not served.

    Args:
        samples: purified or noisy samples that vote; None for the bundle's own default.
        served: the schedule in the place of the bundle's own default.
    """
    manifest = subject.pipeline.manifest
    voters = manifest.samples.default if samples is None else samples
    count = voters if isinstance(voters, int) else manifest.samples.max
    served = served or manifest.default_alphas
    nothing = (0.0,) * manifest.n_latents
    vote_of = f"vote of {voters}" if isinstance(voters, int) else "samples: auto"
    rows = [
        Defence("none", "no defence", _serve(subject), _forward(subject)),
        _blur(subject),
        _noise(subject, count),
        _squeezed(subject, "jpeg", f"JPEG, quality {JPEG_QUALITY}", _jpeg),
        _squeezed(subject, "bits", f"{BITS} bits per value", _few_bits),
        _purifier(subject, "kept", "nothing resampled (all alphas 0)", nothing, voters),
        _purifier(subject, "one", f"{served} schedule (served), one sample", manifest.alphas[served], 1),
        _purifier(subject, "served", f"{served} schedule (served), {vote_of}", manifest.alphas[served], voters),
    ]
    for name, alphas in manifest.alphas.items():
        if name not in (served, *(row.name for row in rows)):
            rows.append(_purifier(subject, name, f"{name} schedule, {vote_of}", alphas, voters))
    return {row.name: row for row in rows}


def remote(served: Defence, client: Client, model: str, classes: int) -> Defence:
    """A running server, asked as anybody asks it; its gradients are those of the reference."""
    serve = asked(client, model, classes)
    return Defence("server", f"the server's {model}", serve, served.forward, served.is_random)


def asked(client: Client, model: str, classes: int) -> Serve:
    """A running server's ``model``. It draws its own seeds; its "logits" are the logarithms of its confidences."""

    def serve(images: Pixels, _: Seeds) -> Predictions:
        answers = [client.predict(encode(image), model, top_k=classes) for image in images]
        confidences = np.zeros((len(images), classes), np.float32)
        for row, answer in zip(confidences, answers, strict=True):
            for entry in answer["top_k"]:
                row[entry["index"]] = entry["confidence"]
        labels = np.array([answer["index"] for answer in answers], np.int64)
        flagged = np.array([answer["flagged"] for answer in answers], np.bool_)
        scores = np.array([answer.get("score", 0.0) for answer in answers], np.float32)
        logits = np.log(confidences.clip(1e-12))
        return Predictions(labels, labels[:, None], logits, flagged, scores, np.zeros(len(images), np.float32))

    return serve


def gaussian(images: Pixels, sigma: float, seeds: Seeds) -> Pixels:
    """Images with Gaussian noise of standard deviation ``sigma``, for pixels from 0 to 1, rounded to 8 bits again."""
    drawn = normal(images.shape[1:], seeds)
    return (images + 255 * np.float32(sigma) * drawn).round().clip(0, 255).astype(np.uint8)


def _serve(subject: Subject, change: Callable[[Pixels], NDArray[Any]] = lambda images: images) -> Serve:
    """The served classifier behind ``change``, which may give 8-bit images or floats (N, 3, H, W)."""

    def serve(images: Pixels, _: Seeds) -> Predictions:
        return Predictions.of(_classify(subject, change(images))[:, None], _classify(subject, images))

    return serve


def _forward(subject: Subject, change: Callable[[Tensor], Tensor] = lambda images: images) -> Forward:
    def forward(images: Tensor, _: int) -> Trace:
        changed = change(images).to(subject.device)
        return Trace(subject.fast_classifier(changed)[None].cpu(), {"classify": (changed,)})

    return forward


def _blur(subject: Subject) -> Defence:
    def blurred(images: Tensor) -> Tensor:
        return blur_images(images, gaussian_taps(7)).clamp(0, 1)

    serve = _serve(subject, lambda images: blurred(to_float(images)).numpy())
    return Defence("blur", "blur, sigma 1", serve, _forward(subject, blurred))


def _noise(subject: Subject, samples: int, l2: float = NOISE_L2) -> Defence:
    """A vote of the classifier over ``samples`` noisy samples, each with Gaussian noise of norm ``l2``."""

    def serve(images: Pixels, seeds: Seeds) -> Predictions:
        clean, voters = to_float(images), []
        for sample in range(samples):
            drawn = normal(images.shape[1:], [seed + (sample << 40) for seed in seeds]).transpose(0, 3, 1, 2)
            voters.append(_classify(subject, add_noise(clean, torch.from_numpy(drawn), l2).numpy()))
        return Predictions.of(np.stack(voters, axis=1), _classify(subject, images))

    def forward(images: Tensor, draws: int) -> Trace:
        noisy = images.to(subject.device).repeat(draws, 1, 1, 1)
        noisy = add_noise(noisy, torch.randn_like(noisy), l2)
        return Trace(subject.fast_classifier(noisy).view(draws, len(images), -1).cpu(), {"classify": (noisy,)})

    return Defence("noise", f"noise of L2 {l2:g}, vote of {samples}", serve, forward, True)


def _squeezed(subject: Subject, name: str, title: str, squeeze: Callable[[Pixels], Pixels]) -> Defence:
    """``squeeze`` in front of the classifier; gradients go straight through it (Athalye et al., ICML 2018, BPDA)."""

    def straight_through(images: Tensor) -> Tensor:
        return images + (to_float(squeeze(to_bytes(images))) - images).detach()

    return Defence(name, title, _serve(subject, squeeze), _forward(subject, straight_through))


def _purifier(subject: Subject, name: str, title: str, alphas: Sequence[float], samples: int | str) -> Defence:
    """The whole pipeline as it is served."""
    l2 = subject.pipeline.manifest.input_noise_l2
    is_random = any(alphas) or l2 > 0
    if not is_random:
        samples = 1  # without any noise all samples are the same

    def serve(images: Pixels, seeds: Seeds) -> Predictions:
        results = [
            subject.pipeline.run(images[i : i + _CHUNK], samples, seeds[i : i + _CHUNK], alphas=list(alphas))
            for i in range(0, len(images), _CHUNK)
        ]
        most = max(result.sample_logits.shape[1] for result in results)  # "auto" draws as many as a chunk needs
        ends = [((0, 0), (0, most - result.sample_logits.shape[1]), (0, 0)) for result in results]
        logits = [np.pad(r.sample_logits, e, constant_values=np.nan) for r, e in zip(results, ends, strict=True)]
        before = [result.unpurified_logits for result in results]
        deviation = [np.nanstd(result.purified, axis=1).mean(axis=(1, 2, 3)) for result in results]
        return Predictions.of(np.concatenate(logits), np.concatenate(before), np.concatenate(deviation))

    @functools.cache
    def differentiable() -> Differentiable:
        return Differentiable(subject.purifier, alphas, subject.blur, l2, subject.device)

    def forward(images: Tensor, draws: int, seeds: Seeds = ()) -> Trace:
        purified, stages = differentiable()(images, draws, seeds)
        logits = subject.fast_classifier(purified).view(draws, len(images), -1)
        return Trace(logits.cpu(), {**stages, "classify": (purified,)})

    return Defence(name, title, serve, forward, is_random, seeded=forward)


def _classify(subject: Subject, images: NDArray[Any]) -> FloatArray:
    return np.concatenate([subject.pipeline.classify(images[i : i + _CHUNK]) for i in range(0, len(images), _CHUNK)])


def normal(shape: tuple[int, ...], seeds: Seeds) -> FloatArray:
    """(N, *shape), standard normal: each image's noise is its own, whatever else is in the batch."""
    return np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds])


def _jpeg(images: Pixels) -> Pixels:
    decoded = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY)
        decoded.append(np.asarray(Image.open(stream).convert("RGB")))
    return np.stack(decoded)


def _few_bits(images: Pixels) -> Pixels:
    """Feature squeezing (Xu, Evans and Qi, NDSS 2018)."""
    most = 2**BITS - 1
    return ((images / 255 * most).round() / most * 255).round().astype(np.uint8)
