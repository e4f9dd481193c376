"""Training of the sign classifier: plain, so that it stands for any. It sees no purified and no attacked image.

    python -m mlvgm.training.classifier --data GTSRB --out model_store/road-signs

Left out because each moves what attacks find from fine detail, which purification replaces, towards coarse shapes,
which it keeps: SGD instead of Adam, label smoothing, sensor noise and soft pictures among the training images.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from mlvgm.training.data import Signs, load_signs, split_by_track
from mlvgm.training.images import augment
from mlvgm.training.loop import cosine_rate, shuffled
from mlvgm.vgg import VGG11

BATCH = 128
PEAK_RATE = 2e-3
WARMUP = 0.15
"""Share of the steps in which the learning rate rises."""


def train_classifier(train: Signs, validation: Signs, model: VGG11, epochs: int) -> VGG11:
    """Fit ``model`` by Adam with augmentation."""
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_RATE)
    images, labels = train.tensors()
    per_epoch = len(train) // BATCH
    steps = epochs * per_epoch
    for epoch in tqdm(range(epochs), "classifier", unit="epoch", disable=None):
        model.train()
        total = 0.0
        order = torch.from_numpy(shuffled(len(train), seed=epoch))
        torch.manual_seed(epoch)
        for i, index in enumerate(order[: per_epoch * BATCH].split(BATCH)):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * cosine_rate(epoch * per_epoch + i, steps, round(WARMUP * steps))
            augmented = augment(images[index]).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(augmented), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        held_out = accuracy(model, validation)
        tqdm.write(f"epoch {epoch + 1}: loss {total / per_epoch:.4f}, held-out accuracy {held_out:.4f}")
    return model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, signs: Signs) -> float:
    """Share of ``signs`` that ``model`` names rightly."""
    model.eval()
    images, labels = signs.tensors()
    parts = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(signs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the classifier of road-signs.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz or the official GTSRB folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for classifier.safetensors")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train, validation = split_by_track(load_signs(args.data, "train"))
    classifier = VGG11(n_classes=43, width=0.5, pool=1)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    classifier = train_classifier(train, validation, classifier, args.epochs)
    tensors = {key: value.contiguous() for key, value in classifier.state_dict().items()}
    save_file(tensors, args.out / "classifier.safetensors")


if __name__ == "__main__":
    main()
