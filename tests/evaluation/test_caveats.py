from typing import Any

import numpy as np

from evaluation.caveats import caveats
from evaluation.shares import share


def _of(count: int, n: int = 1000) -> dict[str, Any]:
    return share(np.arange(n) < count)


def _content(**served: dict[str, Any]) -> dict[str, Any]:
    accuracy = {"none": {"clean": _of(970), "deepfool": _of(2)}, "served": {"clean": _of(950), **served}}
    titles = {name: name for name in ("clean", "deepfool", "cw", "apgd", "white", "square", "linf")}
    return {
        "defences": {"none": "none", "served": "served", "blur": "blur"},
        "threats": titles,
        "accuracy": accuracy,
        "worst": {"served": _of(500), "blur": _of(300), "none": _of(0)},
        "engine_agrees": 1.0,
    }


def _cell(**changes: Any) -> dict[Any, Any]:
    gradients = {"zero": {"images": 0.0, "classify": 0.0}, "broken": {"images": 0.0, "classify": 0.0}, "cosine": 0.95}
    record = {"right": [1] * 500, "draws": 4, "broken": [200, 5], "late": 3, "gradients": {**gradients}}
    record["gradients"].update(changes.pop("gradients", {}))
    return {("served", "white"): [{**record, **changes}, {**record, **changes}], ("none", "white"): []}


def test_a_sound_report_has_none() -> None:
    assert caveats(_content(apgd=_of(800), white=_of(500), square=_of(700), linf=_of(600)), _cell()) == []
    assert caveats(_content(apgd=_of(500), white=_of(104, 200)), _cell()) == []  # fewer images, no difference


def test_each_sign_of_a_weak_attack_is_told() -> None:
    cases = [
        (_content(apgd=_of(400), white=_of(500)), _cell(), "weaker than one that does not"),
        (_content(square=_of(400), linf=_of(500)), _cell(), "masked"),
        (_content(white=_of(90, 100)), _cell(), "Few images"),
        ({**_content(), "worst": {"served": _of(500), "blur": _of(490)}}, _cell(), "No difference"),
        ({**_content(), "engine_agrees": 0.9}, _cell(), "the bundle's models"),
        (_content(), _cell(gradients={"zero": {"images": 0.0, "classify": 0.25}}), "zero for 25.0%"),
        (_content(), _cell(gradients={"broken": {"images": 0.1, "classify": 0.0}}), "not finite for 10.0%"),
        (_content(), _cell(gradients={"cosine": 0.3}), "cosine of 0.30"),
        (_content(), _cell(late=30), "take more steps"),
        (_content(), _cell(broken=[200, 30]), "take more restarts"),
    ]
    for content, cells, words in cases:
        found = caveats(content, cells)
        assert len(found) == 1, (words, found)
        assert words in found[0]
    weak = _content()
    weak["accuracy"]["none"]["deepfool"] = _of(100)
    assert "too weak" in caveats(weak, {})[0]
