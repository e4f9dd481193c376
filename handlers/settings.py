"""Settings of an archive for serving its bundle."""

from dataclasses import dataclass
from typing import Annotated, Literal

from handlers import runtimes
from handlers.fields import Range, none_of


@dataclass(frozen=True)
class HandlerSettings:
    """The section ``handler:`` of the model's YAML file.

    Attributes:
        runtime: one of `handlers.runtimes.NAMES`.
        threads: CPU threads of each worker; 0 for every core.
        allow_seed: let clients choose the seed. An attacker could then search for noise that helps an attack.
        max_wait_s: requests queued for longer are answered with 503; needs `X-Request-Start` from the proxy
            (`handlers.arrival`).
        suspicious: what to do with an image whose attack score is above the bundle's threshold: "pass" only reports it,
            "review" marks the answer for review, "refuse" answers 422.
        certify_draws: largest number of counted noisy images for the certificates of a request; 0 for no certificates.
            They take as long as that many samples, and all requests of the batch wait for them.
        certify_sigma, certify_alpha: standard deviation of the noise, and the probability that a radius is too large.
    """

    runtime: str = "auto"
    threads: Annotated[int, Range(0, 1024)] = 0
    allow_seed: bool = False
    max_wait_s: Annotated[int, Range(1, 86_400)] = 30
    suspicious: Literal["pass", "review", "refuse"] = "pass"
    certify_draws: Annotated[int, Range(0, 100_000)] = 0
    certify_sigma: Annotated[float, Range(0.001, 10.0)] = 0.25
    certify_alpha: Annotated[float, Range(1e-9, 0.5)] = 0.001

    def __post_init__(self) -> None:
        if self.runtime not in runtimes.NAMES:
            raise ValueError(f"runtime is {none_of(self.runtime, runtimes.NAMES)}")


DEFAULTS = HandlerSettings()
