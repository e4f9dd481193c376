"""The cases of each group.

The words of a case say what is done: "published" operators in eager fp32, or "rewritten" ones; "half" precision; "nhwc"
(channels last); "search" (cuDNN tries its algorithms); "shifted" (the blur as shifted sums); "compiled" by Inductor for
this number of rows; "graph" (recorded as a CUDA graph); "profile" (kernels are counted and timed). "answers" are whole
ones of 32 samples, of the product's pipeline, in calls of so many rows at most. The groups "e4e product" and
"road-signs" run programs from files in the runtime "torch", as it is served.
"""

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.gpu import ceilings, product
from benchmarks.gpu.bench import Bench, Case, Measured
from benchmarks.gpu.models import Models

# A line is a case for each number of rows behind it; after "=" what it was predicted to take, in milliseconds.
_E4E = """
decode published: 4
decode half profile: 8
decode half graph: 1=3.3 8=20.8
decode half search shifted graph: 8
decode half nhwc search profile: 8
decode half nhwc search graph: 1 8=16.4 32
"""
_E4E_COMPILED = """
decode half nhwc search shifted compiled graph: 8=8.6 32=31.4
decode half nhwc search compiled graph: 8
encode half nhwc search graph: 1
encode half nhwc search compiled graph: 1
answers half nhwc search graph by 32: 1
answers half nhwc search shifted compiled graph by 32: 1 4
answers half nhwc search shifted compiled graph by 8: 1 4
decode half nhwc search shifted compiled profile: 8
"""
_NVAE = """
encode half search graph: 8 32
encode half nhwc search graph: 8 32
decode published: 4
decode half search graph: 8 32
decode half nhwc search graph: 8 32
answers half nhwc search graph by 32: 1 4
decode half nhwc search profile: 8
"""
_NVAE_COMPILED = """
decode half nhwc search compiled graph: 32
encode half nhwc search compiled graph: 32
answers half nhwc search compiled graph by 32: 1
decode half nhwc search compiled graph: 8
decode half search compiled graph: 32
encode half nhwc search compiled graph: 8
answers half nhwc search compiled graph by 32: 4
answers half nhwc search graph by 32: 1
"""


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
    "e4e": partial(_of_models, "e4e", _E4E),
    "e4e compiled": partial(_of_models, "e4e", _E4E_COMPILED),
    "e4e product": product.e4e,
    "nvae": partial(_of_models, "nvae", _NVAE),
    "nvae compiled": partial(_of_models, "nvae", _NVAE_COMPILED),
}
