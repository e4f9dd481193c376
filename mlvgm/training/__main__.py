"""Train the default model from the German Traffic Sign Recognition Benchmark.

    python -m mlvgm.training --data DATA --out model_store/road-signs

Both halves keep a checkpoint in ``--work`` and go on from it when started again.
"""

import argparse
import json
from pathlib import Path

import torch

from mlvgm.nvae import NVAE, NVAEConfig
from mlvgm.training.classifier import accuracy, train_classifier
from mlvgm.training.data import load_signs, split_by_track
from mlvgm.training.nvae import train_nvae
from mlvgm.vgg import VGG11

NVAE_CONFIG = NVAEConfig(
    resolution=32,
    groups=(1, 2, 4),
    cells_per_group=1,
    latent_channels=8,
    flow_cells=0,
    channels=16,
    blocks=1,
    cells_per_block=1,
    mixtures=3,
    expansion=2,
    kernel=3,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlvgm.training", description="Train the road-signs model.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz or the official GTSRB folders")
    parser.add_argument("--out", type=Path, default=Path("model_store/road-signs"), help="where the weights go")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="where the checkpoints go")
    parser.add_argument("--only", choices=("classifier", "nvae"), help="train one half")
    parser.add_argument("--epochs", type=int, default=12, help="of the classifier")
    parser.add_argument("--steps", type=int, default=4200, help="of the NVAE, 32 images each")
    parser.add_argument("--beta", type=float, default=0.3, help="weight of the NVAE's divergence")
    args = parser.parse_args()

    from safetensors.torch import save_file

    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train, validation = split_by_track(load_signs(args.data, "train"))
    print(f"{len(train)} training and {len(validation)} validation images, split by track")
    if args.only != "nvae":
        classifier = VGG11(n_classes=43, width=0.5, pool=1)
        classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        classifier = train_classifier(train, validation, classifier, args.epochs, args.work / "classifier.pt")
        save_file(_plain(classifier), args.out / "classifier.safetensors")
        print(f"classifier: validation accuracy {accuracy(classifier, validation):.4f}")
    if args.only != "classifier":
        network = NVAE(NVAE_CONFIG)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network = train_nvae(train, validation, network, args.steps, args.work / "nvae.pt", beta=args.beta)
        configuration = {"configuration": json.dumps(NVAE_CONFIG.to_checkpoint())}
        save_file(_plain(network), args.out / "nvae.safetensors", metadata=configuration)


def _plain(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in module.state_dict().items()}


if __name__ == "__main__":
    main()
