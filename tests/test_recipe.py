"""Recipes: presets, lists and TOML end in the same checked value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphopt.criteria import CRITERIA, criterion
from graphopt.errors import RecipeError
from graphopt.inputs.probes import KINDS
from graphopt.inputs.source import SOURCES
from graphopt.passes import FoldBatchnorm, PruneChannels, Quantize
from graphopt.passes.fold_reconstruction import RECONSTRUCTIONS
from graphopt.recipe import PASSES, PRESETS, build_pass, preset, read_recipe, read_value, resolve
from graphopt.search import ALLOCATIONS

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_in_an_order_that_the_contracts_allow(name: str) -> None:
    assert preset(name).passes


def test_exact_holds_no_lossy_pass() -> None:
    assert all(single.semantics.value == "exact" for single in preset("exact").passes)


def test_every_pass_is_in_some_preset() -> None:
    used = {single.name for name in PRESETS for single in preset(name).passes}
    left_out = {
        "decompose": "loses accuracy that only the user can weigh, so far in no recipe",
        "dequantize": "undoes what others do",
        "equalize-channels": "gains nothing where weights have a scale each",
    }
    assert used | set(left_out) == set(PASSES)
    assert not used & set(left_out)


def test_pruning_comes_before_what_hides_batch_normalization_and_attention() -> None:
    for name in ("prune", "prune-int8"):
        order = [single.name for single in preset(name).passes]
        assert order[:3] == ["fold-constants", "eliminate-identity", "prune-channels"]
        assert preset(name).tolerance is None
        assert dict(preset(name).passes[2].options())["compensation"] == "least-squares"
    assert order[-4:] == ["quantize", "fold-reconstruction", "pad-channels", "merge-initializers"]
    with pytest.raises(RecipeError, match="quantize stands before prune-channels"):
        resolve(["quantize", "prune-channels"])


def test_with_options_changes_one_pass_and_leaves_the_rest() -> None:
    recipe = preset("prune").with_options("prune-channels", macs=0.5, keep=["3.*"])
    options = dict(recipe.passes[2].options())
    assert (options["macs"], options["keep"], options["compensation"]) == (0.5, ("3.*",), "least-squares")
    assert (*recipe.passes[:2], *recipe.passes[3:]) == (*preset("prune").passes[:2], *preset("prune").passes[3:])
    assert recipe.with_options("prune-channels", macs=None, ratio=0.2).passes[2] != recipe.passes[2]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("quantise", {}, "the recipe has no pass 'quantise'.*did you mean 'quantize'"),
        ("quantize", {"bit": 4}, "no option 'bit'.*did you mean 'bits'"),
        ("quantize", {"bits": 99}, "bits"),
        ("prune-channels", {"ratio": 0.5, "macs": 0.5}, "several targets are given: ratio, macs"),
        ("prune-channels", {"ratio": 1.5}, "ratio is 1.5"),
        ("prune-channels", {"criterion": "l3"}, "l3"),
        ("prune-channels", {"keep": "conv1"}, "keep is one string"),
    ],
)
def test_bad_options_name_the_pass(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        preset("prune-int8").with_options(name, **options)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ('"l2"', "l2"),
        ("l2", "l2"),
        ('["*a*", "b"]', ["*a*", "b"]),
        ('{name = "global"}', {"name": "global"}),
        ("1\nother = 2", "1\nother = 2"),
        ("", ""),
    ],
)
def test_values_of_the_command_line_are_those_of_toml(text: str, value: object) -> None:
    assert read_value(text) == value


def test_a_pruning_in_toml(tmp_path: Path) -> None:
    file = tmp_path / "narrow.toml"
    file.write_text(
        '[[pass]]\nname = "prune-channels"\nmacs = 0.5\nkeep = ["head*"]\ncompensation = "mean"\n'
        '[pass.criterion]\nname = "l1"\ncombine = "max"\n'
        '[[pass]]\nname = "fold-reconstruction"\nsource = "probes"\n'
    )
    first, second = read_recipe(file).passes
    assert dict(first.options())["macs"] == 0.5
    assert str(dict(first.options())["criterion"]) == str(criterion("l1", combine="max"))
    assert str(second) == "fold-reconstruction(source='probes')"


def test_recipes_in_the_documents_are_recipes(tmp_path: Path) -> None:
    text = (DOCUMENTS / "passes.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "block.toml").write_text(block)
        assert len(read_recipe(tmp_path / "block.toml").passes) == 2


def test_the_guide_to_pruning_names_every_choice() -> None:
    text = (DOCUMENTS / "pruning.md").read_text()
    options = [name for name, _ in PruneChannels().options()]
    for name in (*CRITERIA, *ALLOCATIONS, *RECONSTRUCTIONS, *SOURCES[1:], *KINDS, *options, "prune", "prune-int8"):
        assert re.search(rf"\b{re.escape(name)}\b", text), name


def test_runs_after_names_passes_that_exist() -> None:
    for kind in PASSES.values():
        assert set(kind.runs_after) <= set(PASSES), kind.name


def test_wrong_order_is_refused() -> None:
    with pytest.raises(RecipeError, match="quantize stands before fold-batchnorm"):
        resolve([Quantize(), FoldBatchnorm()])


def test_names_and_objects_mix() -> None:
    assert [single.name for single in resolve(["fold-batchnorm", Quantize()]).passes] == ["fold-batchnorm", "quantize"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("nonsense", "unknown recipe 'nonsense'"),
        ("int9", "did you mean 'int8'"),
        (["fold-batchnrom"], "did you mean 'fold-batchnorm'"),
        ([], "holds no pass"),
        ([3], "made of passes, not of int"),
        ("missing.toml", "cannot be read"),
    ],
)
def test_bad_recipes(recipe: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(recipe)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_toml(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'tolerance = 0.2\n[[pass]]\nname = "fold-batchnorm"\n[[pass]]\nname = "quantize"\nranges = "entropy"\n'
    )
    recipe = read_recipe(file)
    assert (recipe.name, recipe.tolerance) == ("mine", 0.2)
    assert [str(single) for single in recipe.passes] == ["fold-batchnorm", "quantize(ranges='entropy')"]
    assert resolve(str(file)) == recipe == resolve(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not valid TOML"),
        ("colour = 1", "unknown field 'colour'"),
        ("name = 'x'", r"needs \[\[pass\]\] tables"),
        ("pass = 3", r"needs \[\[pass\]\] tables"),
        ("[[pass]]\noption = 1", "each with a name"),
        ("[[pass]]\nname = 'fold'", "unknown pass 'fold'"),
        ("[[pass]]\nname = 'quantize'\nrange = 'minmax'", "no option 'range'.*did you mean 'ranges'"),
        ("[[pass]]\nname = 'quantize'\nranges = 'magic'", "magic"),
        ("tolerance = 'much'\n[[pass]]\nname = 'quantize'", "tolerance must be a number"),
        ("tolerance = -1\n[[pass]]\nname = 'quantize'", "tolerance must be a number"),
    ],
)
def test_bad_toml_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=f"(?s){message}") as caught:
        read_recipe(file)
    assert "bad.toml" in str(caught.value)


def test_unknown_option_in_code() -> None:
    with pytest.raises(RecipeError, match="has no option 'strength'"):
        build_pass("fold-batchnorm", {"strength": 3})
