"""Which stages of a bundle run once per image, and which once per purified sample."""

from collections.abc import Sequence
from dataclasses import dataclass

from handlers.arrays import FloatArray
from handlers.manifest import StageSpec


@dataclass(frozen=True)
class Plan:
    """How the stages before ``classify`` run where some alphas are 0.

    Attributes:
        per_image, per_sample: the stages that run once per image, and those that run once per sample.
        noise: the noise that the latter take.
        from_image: what else they take, of the former or the images themselves.
    """

    per_image: list[StageSpec]
    per_sample: list[StageSpec]
    noise: set[str]
    from_image: set[str]

    @classmethod
    def of(cls, stages: Sequence[StageSpec], alphas: Sequence[float] | FloatArray) -> "Plan":
        """The plan for these alphas; the last stage always runs once per sample."""
        per_image: list[StageSpec] = []
        per_sample: list[StageSpec] = []
        random: set[str] = set()
        for stage in stages:
            if stage is stages[-1] or any(_varies(t.name, alphas) or t.name in random for t in stage.inputs):
                per_sample.append(stage)
                random |= {output.name for output in stage.outputs}
            else:
                per_image.append(stage)
        outside: set[str] = set()
        made: set[str] = set()
        for stage in per_sample:
            outside |= {tensor.name for tensor in stage.inputs} - made
            made |= {tensor.name for tensor in stage.outputs}
        noise = {name for name in outside if is_noise(name)}
        return cls(per_image, per_sample, noise, outside - noise - {"alphas"})


def _varies(name: str, alphas: Sequence[float] | FloatArray) -> bool:
    """Whether the samples' results differ by the input ``name``: noise that is not multiplied by 0."""
    if name == "noise":
        return any(alpha != 0 for alpha in alphas)
    return name == "input_noise" or (is_noise(name) and alphas[int(name.removeprefix("noise_"))] != 0)


def is_noise(name: str) -> bool:
    """Whether a stage's input of this name is noise."""
    return name in ("noise", "input_noise") or name.startswith("noise_")
