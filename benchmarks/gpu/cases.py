"""The cases of each group.

The words of a case say what is done: "published" operators in eager fp32, or "rewritten" ones; "half" precision; "nhwc"
(channels last); "search" (cuDNN tries its algorithms); "shifted" (the blur as shifted sums); "compiled" by Inductor for
this number of rows; "graph" (recorded as a CUDA graph); "profile" (kernels are counted and timed). "answers" are whole
ones of 32 samples, of the product's pipeline, in calls of so many rows at most. The groups "e4e product" and
"road-signs" run programs from files in the runtime "torch", as it is served.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import yaml

from benchmarks.gpu import ceilings, product
from benchmarks.gpu.bench import Bench, Case, Measured
from benchmarks.gpu.models import Models

MODELS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def _of_models(family: str, table: str, bench: Bench) -> Iterator[Case]:
    models = Models(family, bench)
    for line in table.strip().splitlines():
        name, _, sizes = line.partition(": ")
        stage, *words = name.split()
        for size in sizes.split():
            rows, _, predicted = size.partition("=")
            run: Callable[[], Measured] = partial(models.measure, stage, words, int(rows))
            if stage == "answers":
                run = partial(models.answers, words[:-2], int(words[-1]), int(rows))
            yield Case(name, run, int(rows), float(predicted) if predicted else None)


GROUPS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "ceilings": ceilings.cases,
    "export road-signs": product.export_road_signs,
    "write e4e": product.write_e4e,
    "road-signs": product.cases,
    "e4e product": product.e4e,
    **{group: partial(_of_models, group.split()[0], table) for group, table in MODELS.items()},
}
