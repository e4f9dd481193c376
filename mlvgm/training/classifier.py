"""Training of the sign classifier. It never sees a purified or an attacked image."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mlvgm.training.data import Signs, augment
from mlvgm.training.loop import Progress, batches, cosine_rate
from mlvgm.vgg import VGG11


def train_classifier(train: Signs, validation: Signs, model: VGG11, epochs: int, checkpoint: Path) -> VGG11:
    """Fit ``model`` by SGD with augmentation; resumes from ``checkpoint`` where it exists."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images, labels = train.tensors()
    start = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    progress = Progress("classifier", epochs)
    for epoch in range(start, epochs):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * cosine_rate(epoch, epochs)
        total = 0.0
        for index in batches(len(train), 128, seed=epoch):
            batch = degrade(augment(images[index]))
            loss = F.cross_entropy(model(batch), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        torch.save(state, checkpoint)
        progress.report(epoch + 1, loss=total / len(train), validation=accuracy(model, validation))
    return model.eval()


def degrade(images: Tensor) -> Tensor:
    """What cameras do: half of the images lose resolution, half of them get sensor noise."""
    small = F.avg_pool2d(images, 2)
    soft = F.interpolate(small, scale_factor=2.0, mode="bilinear", align_corners=False)
    share = torch.rand(len(images), 1, 1, 1) * (torch.rand(len(images), 1, 1, 1) < 0.5)
    images = images + share * (soft - images)
    sigma = 0.04 * torch.rand(len(images), 1, 1, 1) * (torch.rand(len(images), 1, 1, 1) < 0.5)
    return (images + sigma * torch.randn_like(images)).clamp(0.0, 1.0)


@torch.no_grad()
def accuracy(model: torch.nn.Module, signs: Signs) -> float:
    """Share of ``signs`` that ``model`` names rightly."""
    model.eval()
    images, labels = signs.tensors()
    parts = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(signs)
