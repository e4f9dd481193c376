"""The ``classify`` stage: any classifier, published, one's own module, or an ONNX file."""

from typing import cast

from torch import Tensor, nn

from export.fold import fold_batch_norms
from export.stage import Stage


def stage(classifier: nn.Module, image_size: int, n_classes: int) -> Stage:
    """``classify`` of a module that takes images (B, 3, H, W) in [0, 1] and returns logits (B, n_classes)."""

    def twin(images: Tensor) -> Tensor:
        return cast(Tensor, classifier(images))

    return Stage(
        "classify",
        lambda: fold_batch_norms(classifier),
        twin,
        (("images", ("B", 3, image_size, image_size)),),
        (("logits", ("B", n_classes)),),
    )
