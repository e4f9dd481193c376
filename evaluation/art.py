"""The defence in the Adversarial Robustness Toolbox (ART): as a preprocessor with gradients, and as a server to ask."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.attacks import AttackError
from evaluation.photographs import to_pixels
from handlers.client import Client
from mlvgm.purifier import Purifier

try:
    from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork
except ImportError:
    raise AttackError("ART is not installed: pip install adversarial-robustness-toolbox") from None


class Purification(PreprocessorPyTorch):  # type: ignore[misc]
    """A purifier in front of a classifier of ART: one of the ``preprocessing_defences`` of a ``PyTorchClassifier``.

    Each image becomes one purified sample, with fresh noise from PyTorch's generator, and gradients go through the
    whole purifier. A served bundle lets several samples vote: that is `client_estimator`, which has no gradients.

    Attributes:
        alphas: the effective ones, one for each latent.
        blur: whether the input is blurred first, as the paper's blur variant does.
    """

    params: ClassVar[list[str]] = ["alphas", "blur"]

    def __init__(self, purifier: Purifier, alphas: Sequence[float], blur: bool = False) -> None:
        super().__init__(device_type="cpu", is_fitted=True, apply_fit=False, apply_predict=True)
        self.purifier, self.alphas, self.blur = purifier.eval().requires_grad_(False), list(alphas), blur

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        """(B, 3, H, W) in [0, 1] to the same of one purified sample each; labels as they are."""
        noise = [torch.randn(len(x), *shape) for shape in self.purifier.noise_shapes]
        return self.purifier.purify(x, noise, self.alphas, self.blur).images.clamp(0, 1), y


def black_box(
    predict: Callable[[NDArray[Any]], NDArray[Any]], image_size: tuple[int, int], classes: int
) -> BlackBoxClassifierNeuralNetwork:
    """ART's estimator for ``predict``, of images (B, H, W, 3) in [0, 1] to scores (B, C)."""
    shape = (*image_size, 3)
    return BlackBoxClassifierNeuralNetwork(predict, shape, classes, channels_first=False, clip_values=(0, 1))


def client_estimator(
    client: Client, model: str, image_size: tuple[int, int], classes: int, queries: int | None = None
) -> BlackBoxClassifierNeuralNetwork:
    """ART's estimator for a model that a server has: it sends each image, rounded to 8 bits, and takes the confidences.

    Args:
        image_size: height and width in pixels.
        queries: most images that may be sent; without a limit if None.

    The estimator raises AttackError where an attack asks for more than ``queries``, and what `Client.predict` raises.
    """
    from evaluation.defences import asked

    serve, sent = asked(client, model, classes), 0

    def predict(images: NDArray[Any]) -> NDArray[Any]:
        nonlocal sent
        if queries is not None and sent + len(images) > queries:
            raise AttackError(f"the budget of {queries} queries is spent")
        sent += len(images)
        found = serve(to_pixels(images), range(len(images)))
        return np.exp(found.logits)

    return black_box(predict, image_size, classes)
