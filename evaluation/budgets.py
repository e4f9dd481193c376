"""What an evaluation may cost, and the threats that it consists of."""

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation import changes
from evaluation.adaptive import Effort
from evaluation.black_box import HopSkipJump, Square
from evaluation.threats import Certified, Clean, Engine, Quiet, Seeded, Threat, Transferred, White

TRIES = 10


@dataclass(frozen=True)
class Budget:
    """What an evaluation may cost.

    Attributes:
        effort: of attackers with gradients.
        queries: of those without.
        draws: of a certificate.
        images: None for all.
        few: images that costly threats are measured on, the first ones.
    """

    effort: Effort
    queries: int
    draws: int
    images: int | None
    few: int


BUDGETS: Mapping[str, Budget] = {
    "quick": Budget(Effort(10, 1, 4), 100, 100, 100, 50),
    "standard": Budget(Effort(100, 5, 16), 1000, 1000, 1000, 200),
    "full": Budget(Effort(100, 5, 64), 5000, 1000, None, 1000),
}

QUICK = ("deepfool", "apgd", "white")
QUICK_DEFENCES = ("none", "blur", "kept", "served")


def threats(budget: Budget, l2: float = 0.5, linf: float = 4 / 255, sigma: float = 0.25) -> dict[str, Threat]:
    """All columns by name, in the order of a report.

    Args:
        l2, linf: norms of the largest change, for pixels from 0 to 1.
        sigma: standard deviation of noise.
    """
    effort, queries, draws, ball = budget.effort, budget.queries, budget.draws, changes.L2(l2)
    return {
        "clean": Clean("clean"),
        "noise": Clean(f"noise, sigma {sigma:g}", sigma),
        "deepfool": Transferred("DeepFool", "deepfool"),
        "cw": Transferred("Carlini-Wagner", "cw"),
        "apgd": Transferred(f"Auto-PGD on the classifier, L2 {l2:g}", "", ball, effort),
        "repeat": Transferred(f"the same, sent {TRIES} times", "", ball, effort, TRIES),
        "white": White(f"white box, L2 {l2:g}", ball, effort),
        "engine": Engine(f"white box, forward through the engines, L2 {l2:g}", ball, effort),
        "seed": Seeded(f"white box that chooses the seed, L2 {l2:g}", ball, effort),
        "quiet": Quiet(f"white box that keeps the score low, L2 {l2:g}", ball, effort),
        "linf": White(f"white box, Linf {255 * linf:g}/255", changes.Linf(linf), effort),
        "square": Square(f"Square, {queries} queries, Linf {255 * linf:g}/255", queries, linf),
        "hopskipjump": HopSkipJump(f"HopSkipJump, {queries} queries", queries),
        "lowfreq": White(f"white box, low frequencies, L2 {2 * l2:g}", changes.LowFrequency(2 * l2), effort),
        "patch": White("white box, patch of 4 %", changes.Patch(0.5), effort),
        "flow": White("white box, flow of 1 pixel", changes.Flow(1.0), effort),
        "defocus": White("white box, blur of up to 1 pixel", changes.Blur(0.5), effort),
        "certify": Certified(f"certified at sigma {sigma:g}", sigma, draws),
    }
