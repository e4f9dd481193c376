"""Training of the sign classifier: plain, so that it stands for any. It sees no purified and no attacked image.

Left out because each moves what attacks find from fine detail, which purification replaces, towards coarse shapes,
which it keeps: SGD instead of Adam, label smoothing, sensor noise and soft pictures among the training images.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from mlvgm.training.data import Signs, augment
from mlvgm.training.loop import Progress, batches, cosine_rate
from mlvgm.vgg import VGG11

BATCH = 128
PEAK_RATE = 2e-3
WARMUP = 0.15
"""Share of the steps in which the learning rate rises."""


def train_classifier(train: Signs, validation: Signs, model: VGG11, epochs: int, checkpoint: Path) -> VGG11:
    """Fit ``model`` by Adam with augmentation; resumes from ``checkpoint`` where it exists."""
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_RATE)
    images, labels = train.tensors()
    start = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    per_epoch = len(train) // BATCH
    steps = epochs * per_epoch
    progress = Progress("classifier", epochs)
    for epoch in range(start, epochs):
        model.train()
        total = 0.0
        for i, index in enumerate(batches(len(train), BATCH, seed=epoch)):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * cosine_rate(epoch * per_epoch + i, steps, round(WARMUP * steps))
            loss = F.cross_entropy(model(augment(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        torch.save(state, checkpoint)
        progress.report(epoch + 1, loss=total / per_epoch, validation=accuracy(model, validation))
    return model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, signs: Signs) -> float:
    """Share of ``signs`` that ``model`` names rightly."""
    model.eval()
    images, labels = signs.tensors()
    parts = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(signs)
