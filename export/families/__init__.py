"""The purifier families that can be exported: each is a module with a function ``stages``, called here.

The modules named ``*_fp16`` register the half-precision forms of a family's layers when they are imported.
"""

from collections.abc import Iterable

from export.families import nvae, nvae_fp16, stylegan2, stylegan2_fp16  # noqa: F401
from export.families.preprocess import with_preprocessing
from export.stage import Stage
from handlers.manifest import StageSpec
from handlers.plan import is_noise
from mlvgm.nvae import NVAEPurifier
from mlvgm.purifier import Purifier
from mlvgm.stylegan2 import StyleGan2Purifier


def stages(purifier: Purifier, blur: bool, input_noise_l2: float, kept: int = 0) -> tuple[Stage, ...]:
    """The stages before ``classify``, in the order they run.

    Args:
        blur: whether images are blurred first.
        input_noise_l2: L2 norm of the noise added to each image, 0 for none; the noise is an input of the first stage.
        kept: of an NVAE's latents, so many are decoded in a stage of their own (`export.families.nvae.stages`).

    Raises:
        ValueError: no family knows how to export this purifier.
    """
    if isinstance(purifier, NVAEPurifier):
        first, *others = nvae.stages(purifier, kept)
    elif isinstance(purifier, StyleGan2Purifier):
        first, *others = stylegan2.stages(purifier)
    else:
        raise ValueError(f"no export for a {type(purifier).__name__} (A-VAE and ND-VAE are for comparison alone)")
    return with_preprocessing(first, purifier.image_size, blur, input_noise_l2), *others


def kept_by(alphas: Iterable[float]) -> int:
    """How many latents come before the first that these alphas resample."""
    return next((i for i, alpha in enumerate(alphas) if alpha), 0)


def kept(stages: Iterable[StageSpec]) -> int:
    """With how many latents ``kept`` the stages of a bundle were made."""
    return sum(is_noise(tensor.name) for stage in stages if stage.name == "coarse" for tensor in stage.inputs)
