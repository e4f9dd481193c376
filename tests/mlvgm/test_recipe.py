"""Recipes: the built-in ones say what the paper says, and a wrong one is refused in one sentence."""

import datetime
from pathlib import Path

import pytest
import yaml

from mlvgm.recipe import ARCHITECTURES, RECIPES, Batch, Recipe, RecipeError, Samples


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_built_in_recipes_are_sound(path: Path) -> None:
    recipe = Recipe.read(path.stem)
    assert recipe.name == path.stem
    for schedule in ("linear", "cosine"):
        weights = recipe.alphas[schedule]
        assert list(weights) == sorted(weights)
        assert weights[-1] == 1.0
        # Published schedules are rounded to two or three decimals, and one is truncated to two.
        exact = [(i + 1) / recipe.n_latents for i in range(recipe.n_latents)]
        if schedule == "linear":
            assert max(abs(a - b) for a, b in zip(weights, exact, strict=True)) < 0.01


def test_attenuation_scales_the_weights() -> None:
    cars = Recipe.read("stanford-cars")
    assert cars.effective_alphas() == pytest.approx([0.7 * a for a in cars.alphas["learned"]])
    assert cars.effective_alphas("cosine")[-1] == pytest.approx(0.7)


TINY = {
    "name": "tiny",
    "family": "nvae",
    "image_size": 16,
    "n_latents": 3,
    "classifier": {"architecture": "vgg11"},
    "classes": 3,
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def test_what_is_left_out_has_defaults(tmp_path: Path) -> None:
    recipe = Recipe.read(write(tmp_path))
    assert recipe.classes == ("class 0", "class 1", "class 2")
    assert recipe.alphas == {"linear": pytest.approx((1 / 3, 2 / 3, 1)), "cosine": pytest.approx((0.25, 0.75, 1))}
    assert (recipe.batch, recipe.samples) == (Batch(1, 8, 32), Samples(8, 32))
    assert Recipe.read(write(tmp_path, samples={"default": "auto", "max": 16})).samples == Samples("auto", 16)


def test_files_lie_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    classifier = {"architecture": "onnx", "file": "/models/a.onnx"}
    write(tmp_path / "recipes", purifier="../weights/a.pt", classifier=classifier)
    recipe = Recipe.read("recipes/tiny.yaml")
    assert recipe.purifier == tmp_path / "weights" / "a.pt"
    assert recipe.classifier.file == Path("/models/a.onnx")
    shipped = Recipe.read("road-signs")
    for file in (shipped.purifier, shipped.classifier.file):
        assert file is not None
        assert file.is_file()


def test_fields_can_be_replaced_and_are_checked_too(tmp_path: Path) -> None:
    assert Recipe.read("road-signs", blur=True).blur
    with pytest.raises(RecipeError, match=r"input_noise_l2 is -3.0, must be a number, 0 or more"):
        Recipe.read("road-signs", input_noise_l2=-3.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "red"}, "no field 'colour'"),
        ({"atenuation": 1}, r"no field 'atenuation': the fields are .*did you mean 'attenuation'"),
        ({"cpu_batch": 1}, "no field 'cpu_batch': write batch: {min: 1, opt: 4, max: 8, cpu: 1}"),
        ({"name": "my signs"}, "name is 'my signs', must be text on one line: .*letters a-z, digits"),
        ({"family": "nvea"}, r"family is 'nvea', must be e4e, nvae or style_transformer \(did you mean 'nvae'\?\)"),
        ({"image_size": "large"}, "image_size is 'large', must be a whole number"),
        ({"image_size": 0}, "image_size is 0, must be a whole number"),
        ({"n_latents": 10**9}, "n_latents is 1000000000, must be a whole number"),
        ({"runtime": "onnxrt"}, r"runtime is 'onnxrt', must be .*did you mean 'onnxruntime'"),
        ({"temperature": float("nan")}, "temperature is nan, must be a number above 0"),
        ({"input_noise_l2": -3}, "input_noise_l2 is -3, must be a number, 0 or more"),
        ({"attenuation": 2}, "attenuation is 2, must be a number from 0 to 1"),
        ({"alphas": {"tuned": [0.5]}}, "alphas.tuned has 1 weights, must have one for each latent .n_latents is 3."),
        ({"alphas": {"tuned": [0, 0, 2]}}, r"alphas.tuned\[2\] is 2, must be a number from 0 to 1"),
        ({"alphas": [0, 0, 1]}, "alphas is .*, must be a mapping from names to lists of numbers"),
        ({"schedule": "cosin"}, r"schedule is 'cosin', must be cosine or linear \(did you mean 'cosine'\?\)"),
        ({"batch": [1, 8, 32]}, r"batch is \[1, 8, 32\], must be .*: write {min: 1, opt: 8, max: 32}"),
        ({"batch": {"min": 4, "opt": 2, "max": 8}}, "batch: must have 1 <= min <= opt <= max, not 4, 2, 8"),
        ({"batch": {"min": 1, "opt": 2, "max": 8, "cpu": 9}}, "batch: cpu is 9, must lie between min and max, or be 0"),
        ({"batch": 32}, "batch is 32, must be a mapping with min, opt, max, cpu"),
        ({"samples": [8, 32]}, r"samples is \[8, 32\], must be .*: write {default: 8, max: 32}"),
        ({"samples": [8]}, "samples is .*, must be a mapping with default, max"),
        ({"samples": {"default": 9, "max": 8}}, "samples: must have 1 <= default <= max, not 9 and 8"),
        ({"samples": {"default": "automatic", "max": 8}}, "samples.default is 'automatic', must be .* or auto"),
        ({"precision": "int8"}, "precision is 'int8', must be fp32, fp16 or bf16"),
        ({"classes": ["one"]}, r"classes is \['one'\], must be a list of .*, 2 to 100000"),
        ({"classes": 1}, "classes is 1, must be a list"),
        ({"classes": ["a", "b", "a"]}, "classes has 'a' twice"),
        ({"classes": ["a", False]}, r"classes\[1\] is False, must be text .*in quotes"),
        ({"classifier": "vgg11"}, "classifier is 'vgg11', must be a mapping with architecture, file, mean, std"),
        ({"classifier": {"architecture": "vgg"}}, "architecture is 'vgg', must be .*vgg11.*module:function"),
        ({"classifier": {"architecture": "a b:c"}}, "architecture is 'a b:c', must be .*module:function"),
        ({"classifier": {"architecture": "onnx", "mean": [0, 0]}}, r"mean is \[0, 0\], must be a list of 3 numbers"),
        ({"classifier": {"architecture": "onnx", "std": [0, 1, 1]}}, r"std\[0\] is 0, must be a number above 0"),
    ],
)
def test_a_wrong_recipe_is_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    path = write(tmp_path, **change)
    with pytest.raises(RecipeError, match=rf"{path}: .*{words}") as caught:
        Recipe.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["name", "family", "image_size", "n_latents", "classifier", "classes"])
def test_what_must_be_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in TINY.items() if key != name}))
    with pytest.raises(RecipeError, match=f"{name} is missing, must be"):
        Recipe.read(path)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'road-sign', must be celeba-gender, .* \(did you mean 'road-signs'\?\)"):
        Recipe.read("road-sign")
    with pytest.raises(RecipeError, match="no such file"):
        Recipe.read(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match="is a folder"):
        Recipe.read(tmp_path / "folder.yaml")


def test_what_the_recipe_calls_by_name_is_what_can_be_loaded() -> None:
    pytest.importorskip("torch")
    from mlvgm.load import CLASSIFIERS

    assert {"onnx", *CLASSIFIERS} == set(ARCHITECTURES)


FULL = {
    **TINY,
    "classes": ["a", "b"],
    "schedule": "cosine",
    "alphas": {"tuned": [0, 0.5, 1]},
    "attenuation": 0.5,
    "purifier": "a.pt",
    "temperature": 0.7,
    "input_noise_l2": 0.5,
    "blur": True,
    "precision": "fp16",
    "runtime": "openvino",
    "batch": {"min": 1, "opt": 2, "max": 4, "cpu": 1},
    "samples": {"default": 2, "max": 4},
}
ODD = [
    *[None, "", " ", "x", "1e3", "0.5", "no", "\u202e", "a\tb", "ü" * 10_000],
    *[True, 0, 1, -1, 2, 0.5, 10**400, -(10**400), float("nan"), float("inf"), 1e-300],
    *[
        [],
        [[]],
        [1],
        ["x"],
        [None],
        {},
        {"x": 1},
        {1: 2},
        {"min": 1},
        {"default": [1]},
        datetime.date(2024, 1, 1),
        b"\0",
    ],
]


@pytest.mark.parametrize("name", sorted(FULL))
def test_whatever_stands_in_a_field_is_read_or_named(name: str, tmp_path: Path) -> None:
    assert Recipe.read(write(tmp_path, **FULL)).samples == Samples(2, 4)
    read = []
    for value in ODD:
        path = write(tmp_path, **{**FULL, name: value})
        try:
            read.append(getattr(Recipe.read(path), name))
        except RecipeError as error:
            assert str(error).startswith(f"{path}: "), value  # noqa: PT017
            assert name in str(error), value  # noqa: PT017
            assert len(str(error)) < len(str(path)) + 500, value  # noqa: PT017
    assert len({type(value) for value in read if value is not None}) <= 1, read
