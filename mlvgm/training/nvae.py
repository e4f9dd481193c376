"""Training of an NVAE that purifies (see `mlvgm.training.bound` for what, NVAE's appendix for the schedules)."""

import copy
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mlvgm.checkpoint import CheckpointError, load_tensors, read_checkpoint, weights_digest
from mlvgm.files import open_file, replacing
from mlvgm.load import load_callable, load_shipped_classifier
from mlvgm.nvae import NVAE
from mlvgm.training.bound import Bound, answer_divergence, evidence_lower_bound, random_schedules
from mlvgm.training.images import ImageSet, augment, to_tensor
from mlvgm.training.loop import cosine_rate, shuffled
from mlvgm.training.recorded import RecordedStep
from mlvgm.training.settings import TrainingError, TrainingSettings

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
REPORT_EVERY, SAVE_EVERY = 100, 100
VALIDATION_IMAGES = 256
MAX_NORM = 1.0
"""Gradients are clipped to this norm; a step with a norm that is not finite is skipped."""
SMALL_NOISE = 0.05
"""The most noise that images outside the settings' share ``noisy`` get."""


Report = dict[str, Any]
"""The figures of a step, as `train_nvae` logs them."""


@dataclass
class State:
    """What a checkpoint holds: the weights, their moving average, the optimiser, the steps made, and their reports.

    ``classifier`` is not in it, since it is not trained; nor are ``memory_format``, that of the images and the weights,
    and ``recorded``, since no figure depends on them, but the speed does.
    """

    network: NVAE
    average: NVAE
    optimizer: torch.optim.Optimizer
    classifier: nn.Module | None
    memory_format: torch.memory_format
    step: int = 0
    skipped: int = 0
    reports: list[Report] = field(default_factory=list)
    recorded: RecordedStep | None = None

    def save(self, file: Path, digest: str) -> None:
        """Write all of it, or leave the old file."""
        content = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "reports": self.reports,
            "digest": digest,
        }
        with replacing(file) as draft:
            torch.save(content, draft)

    def load(self, file: Path, digest: str) -> None:
        """Raises TrainingError: it is of other settings or images, or damaged."""
        what = "belongs to a run with other settings or images"
        try:
            with open_file(file) as stream:
                if zipfile.ZipFile(stream).testzip():  # PyTorch looks at no checksum
                    raise zipfile.BadZipFile
                stream.seek(0)
                content = torch.load(stream, weights_only=True, map_location="cpu")
            is_ours = content["digest"] == digest
            if is_ours:
                self.network.load_state_dict(content["network"])
                self.average.load_state_dict(content["average"])
                self.optimizer.load_state_dict(content["optimizer"])
                self.step, self.skipped, self.reports = content["step"], content["skipped"], content["reports"]
        except Exception:  # a damaged file raises almost anything
            is_ours, what = False, "is damaged, or no checkpoint of this version"
        if not is_ours:
            raise TrainingError(f"{file} {what}: remove it to begin anew, or give another --work")


def train_nvae(
    settings: TrainingSettings,
    images: ImageSet,
    work: Path,
    device: torch.device | str = "cpu",
    channels_last: bool = True,
    draw: Callable[[NVAE, int], None] | None = None,
    draw_every: int = 1000,
) -> tuple[NVAE, list[Report]]:
    """Fit an NVAE; goes on from the checkpoint in ``work`` where there is one, to the same weights as undisturbed.

    Args:
        work: folder of the checkpoint, and of ``log.jsonl`` with all reports, one a line, to look at meanwhile.
        device: where to train; on "cuda" convolutions run in bf16, and each step replays a CUDA graph.
        channels_last: the faster order in memory, for shapes that PyTorch can train in it (`mlvgm.training.trial`).
        draw: is given the averaged network, ready for inference, and the step, every ``draw_every`` steps.

    Returns:
        The moving average of the weights on the CPU, with batch-norm statistics of its own; and the reports.

    Raises:
        TrainingError: the images are too few for one batch, the start weights do not fit, or the checkpoint is damaged
            or not of these settings and images.
    """
    if len(images.train) < settings.batch:
        raise TrainingError(f"{len(images.train)} training images do not fill one batch of {settings.batch}")
    device = torch.device(device)
    state = begin(settings, device, channels_last)
    work.mkdir(parents=True, exist_ok=True)
    classifier = "" if state.classifier is None else weights_digest(state.classifier)
    digest = f"{settings.digest} {images.digest} {classifier}"
    if os.path.lexists(work / CHECKPOINT):
        state.load(work / CHECKPOINT, digest)
    with replacing(work / LOG) as draft:
        draft.write_text("".join(map(_json_line, state.reports)))
    held_out = to_tensor(images.images[images.validation[:VALIDATION_IMAGES]], device)
    begun, first = time.monotonic(), state.step
    steps = tqdm(total=settings.steps, initial=state.step, desc="training", unit="step", disable=None)
    for places in _batches(images, settings, state.step):
        bound, answers = step(state, settings, to_tensor(images.images[places], device))
        steps.update()
        last = state.step == settings.steps
        if state.step % REPORT_EVERY == 0 or last:
            figures = _figures(state, bound, answers, held_out)
            state.reports.append(figures)
            with (work / LOG).open("a") as log:
                log.write(_json_line(figures))
            pace = (time.monotonic() - begun) / (state.step - first)
            tqdm.write(_line(figures, settings.steps, pace))
        if state.step % SAVE_EVERY == 0 or last:
            state.save(work / CHECKPOINT, digest)
        if draw is not None and (state.step % draw_every == 0 or last):
            draw(recalibrated(state.average, images, settings, passes=8), state.step)
    steps.close()
    return recalibrated(state.average, images, settings).to("cpu"), state.reports


def recalibrated(network: NVAE, images: ImageSet, settings: TrainingSettings, passes: int = 60) -> NVAE:
    """A copy whose batch-norm statistics are means over ``passes`` batches, with the noise of the training; those of
    training are of other weights.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    network.train()
    device = network.const_prior.device
    # Neighbours are often of one kind: within a batch of these, features would vary too little.
    places = images.train[shuffled(len(images.train), settings.seed)]
    with torch.no_grad():
        for i, batch in enumerate(np.array_split(places, max(1, len(places) // 128))[:passes]):
            torch.manual_seed(i)
            alphas = random_schedules(len(batch), len(network.config.latents()), settings.whole, device)
            clean = to_tensor(images.images[np.sort(batch)], device)
            evidence_lower_bound(network, clean, with_noise(clean, settings), alphas)
    return network.eval().requires_grad_(False)


def begin(settings: TrainingSettings, device: torch.device, channels_last: bool = True) -> State:
    """Fresh weights, or those to start from."""
    torch.manual_seed(settings.seed)
    network = NVAE(settings.shape.config(settings.image_size))
    if settings.start is not None:
        try:
            load_tensors(network, read_checkpoint(settings.start)["state_dict"], settings.start)
        except (CheckpointError, KeyError) as error:
            raise TrainingError(f"start: {error}") from None
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adamax(network.parameters(), lr=settings.rate, foreach=True)
    classifier = None
    if settings.classifier is not None:
        load = load_callable if ":" in settings.classifier else load_shipped_classifier
        classifier = copy.deepcopy(load(settings.classifier)).to(device).requires_grad_(False)
    return State(network, average, optimizer, classifier, memory_format)


def _batches(images: ImageSet, settings: TrainingSettings, step: int) -> Iterator[Any]:
    """Places of the images of every step from ``step`` on: the same, wherever the run begins."""
    per_epoch = len(images.train) // settings.batch
    while step < settings.steps:
        epoch, first = divmod(step, per_epoch)
        order = shuffled(len(images.train), seed=settings.seed + epoch)
        for i in range(first, min(per_epoch, first + settings.steps - step)):
            yield images.train[np.sort(order[i * settings.batch : (i + 1) * settings.batch])]
            step += 1


def step(state: State, settings: TrainingSettings, images: Tensor) -> tuple[Bound, Tensor | None]:
    """One step of the optimiser. All randomness is of the step's own seed, so that a run can be resumed exactly.

    Returns:
        The bound, and how far the classifier's answers are (B,), where there is one.
    """
    number = state.step
    for group in state.optimizer.param_groups:
        group["lr"] = settings.rate * cosine_rate(number, settings.steps, settings.warmup)
    rise = settings.beta_warmup * settings.steps
    beta = settings.beta * (min(1.0, max(number / rise, 0.05)) if rise else 1.0)
    state.network.train()
    if state.recorded is None and images.is_cuda:
        weight = torch.zeros((), device=images.device)
        state.recorded = RecordedStep(partial(_gradients, state, settings), (images, weight), state.optimizer)
    torch.manual_seed((settings.seed << 32) + number)
    gradients = state.recorded or partial(_gradients, state, settings)
    bound, answers, norm = gradients(images, torch.tensor(beta))
    if torch.isfinite(norm):
        state.optimizer.step()
        decay = min(settings.average, (number + 1) / (number + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(state.average.parameters()), list(state.network.parameters()), 1.0 - decay)
    else:
        state.skipped += 1
    state.step += 1
    return bound, answers


def _gradients(
    state: State, settings: TrainingSettings, images: Tensor, beta: Tensor
) -> tuple[Bound, Tensor | None, Tensor]:
    """Leave the clipped gradients in the network's parameters.

    Returns:
        The bound, how far the classifier's answers are, and the norm that the gradients had.
    """
    network, batch = state.network, len(images)
    clean = augment(images, settings.augment) if settings.augment else images
    clean = clean.contiguous(memory_format=state.memory_format)
    seen = with_noise(clean, settings)
    alphas = random_schedules(batch, len(network.config.latents()), settings.whole, images.device)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        bound = evidence_lower_bound(network, clean, seen, alphas)
        answers = None if state.classifier is None else answer_divergence(state.classifier, clean, bound.reconstruction)
    divergence = torch.stack(bound.divergence).sum(dim=0)
    loss = (beta * divergence - bound.log_likelihood).mean() / images[0].numel()
    if answers is not None:
        loss = loss + settings.stability * answers.mean()
    state.optimizer.zero_grad()
    loss.backward()
    return bound, answers, torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)


def with_noise(images: Tensor, settings: TrainingSettings) -> Tensor:
    """What the encoder sees of ``images`` (B, 3, H, W) in [0, 1] in training."""
    sigma, noisy = torch.rand(2, len(images), 1, 1, 1, device=images.device).unbind()
    small, least = min(SMALL_NOISE, settings.noise), settings.least_noise
    sigma = torch.where(noisy < settings.noisy, least + sigma * (settings.noise - least), sigma * small)
    return (images + sigma * torch.randn_like(images)).clamp(0.0, 1.0)


@torch.no_grad()
def _figures(state: State, bound: Bound, answers: Tensor | None, held_out: Tensor) -> Report:
    """What is logged: nats per value of an image, of the answers per image, for the last batch; on held-out images the
    error of reconstructions.
    """
    values = held_out[0].numel()
    network = state.network.eval()
    torch.manual_seed(0)
    parts = [F.mse_loss(evidence_lower_bound(network, part).reconstruction, part) for part in held_out.split(64)]
    return {
        "step": state.step,
        "log_likelihood": bound.log_likelihood.mean().item() / values,
        "divergence": [latent.mean().item() / values for latent in bound.divergence],
        "answer_divergence": None if answers is None else answers.mean().item(),
        "validation_mse": torch.stack(parts).mean().item(),
        "skipped": state.skipped,
    }


def _json_line(report: Report) -> str:
    return json.dumps(report) + "\n"


def _line(figures: Report, steps: int, pace: float) -> str:
    left = pace * (steps - figures["step"])
    each = " ".join(f"{value:.4f}" for value in figures["divergence"])
    answers = "" if figures["answer_divergence"] is None else f"answers {figures['answer_divergence']:.4f}  "
    return (
        f"step {figures['step']}/{steps}  log likelihood {figures['log_likelihood']:.4f}  divergence by latent {each}  "
        f"{answers}validation MSE {figures['validation_mse']:.5f}  {left / 60:.0f} min left"
    )
