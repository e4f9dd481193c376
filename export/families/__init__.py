"""The purifier families that can be exported. A new one is a module with a ``stages`` function, and a line here.

What a family's layers are in half precision is registered by a module of its own, which is imported here for that.
"""

from export.families import nvae, nvae_fp16, stylegan2, stylegan2_fp16  # noqa: F401
from export.families.preprocess import with_preprocessing
from export.stage import Stage
from mlvgm.nvae import NVAEPurifier
from mlvgm.purifier import Purifier
from mlvgm.stylegan2 import StyleGan2Purifier


def stages(purifier: Purifier, blur: bool, input_noise_l2: float) -> tuple[Stage, ...]:
    """The stages in front of ``classify``, in the order they run.

    Args:
        blur: whether images are blurred first.
        input_noise_l2: norm of the noise that is added to them, 0 for none; it is an input of the first stage.

    Raises:
        ValueError: no family knows how to export this purifier.
    """
    if isinstance(purifier, NVAEPurifier):
        first, *others = nvae.stages(purifier)
    elif isinstance(purifier, StyleGan2Purifier):
        first, *others = stylegan2.stages(purifier)
    else:
        raise ValueError(f"no export for a {type(purifier).__name__} (A-VAE and ND-VAE are for comparison alone)")
    return with_preprocessing(first, purifier.image_size, blur, input_noise_l2), *others
