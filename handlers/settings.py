"""What an archive says about how its bundle is served."""

from dataclasses import dataclass
from typing import Annotated, Literal

from handlers import runtimes
from handlers.fields import Range, none_of


@dataclass(frozen=True)
class HandlerSettings:
    """The ``handler:`` section of the model's yaml file.

    Attributes:
        runtime: one of `handlers.runtimes.NAMES`.
        threads: CPU threads of each worker; 0 for every core.
        allow_seed: let clients choose the noise. Whoever can do that can search for noise that suits an attack.
        max_wait_s: a request that has waited for longer is answered 503 instead of costing a worker's time; this needs
            a proxy that says when it came (`handlers.arrival`).
        suspicious: what becomes of an image whose attack score is above the bundle's threshold: "pass" only says so,
            "review" marks the answer, "refuse" answers 422.
        certify_draws: noisy images that count for the certificates of a request, at most; 0 refuses certificates. They
            cost what as many samples do, and everybody waits for them.
        certify_sigma, certify_alpha: standard deviation of their noise, and the risk that a radius is too large.
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
