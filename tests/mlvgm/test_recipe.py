"""Recipes: the built-in ones say what the paper says, and a wrong one is refused in one sentence."""

from pathlib import Path

import pytest
import yaml

from mlvgm.recipe import RECIPES, Recipe, RecipeError


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"alphas": {"tuned": [0.5]}}, "alphas.tuned has 1 weights for 3 latents"),
        ({"alphas": {"tuned": [0, 0, 2]}}, "effective weights must lie in"),
        ({"schedule": "none"}, "schedule 'none' is none of cosine, linear"),
        ({"batch": [4, 2, 8]}, "batch must be three rising numbers"),
        ({"samples": [9, 8]}, "samples must be two rising numbers"),
        ({"precision": "int8"}, "precision 'int8' is none of fp32, fp16, bf16"),
        ({"classes": ["one"]}, "at least two classes"),
    ],
)
def test_a_wrong_recipe_is_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    content = {
        "name": "tiny",
        "family": "nvae",
        "image_size": 16,
        "n_latents": 3,
        "classifier": {"architecture": "vgg11"},
        "classes": 3,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    assert Recipe.read(path).classes == ("class 0", "class 1", "class 2")
    path.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(RecipeError, match=words):
        Recipe.read(path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"'road-sign': give a YAML file or one of .*road-signs"):
        Recipe.read("road-sign")
