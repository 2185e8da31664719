"""The runs of a grid: every combination, named by what it sets; mistakes told before anything is read."""

import pytest

from lora_cli.errors import RecipeError
from lora_cli.recipe.grid import grid


def test_every_combination_is_a_run_named_by_its_values():
    runs = grid(["lora.r=4,8", "training.learning_rate=1e-4,3e-4"])

    assert [run.name for run in runs] == [f"r={r},learning_rate={lr}" for r in (4, 8) for lr in ("1e-4", "3e-4")]
    assert runs[1].overrides == ["lora.r=4", "training.learning_rate=3e-4"]


def test_values_are_apart_as_yaml_has_them():
    runs = grid(["lora.targets=qv,[q_proj, v_proj],'a,b'"])

    assert [run.settings["lora.targets"] for run in runs] == ["qv", "[q_proj, v_proj]", "'a,b'"]
    assert [run.name for run in runs] == ["targets=qv", "targets=q_proj-v_proj", "targets=a-b"]


def test_names_that_values_alone_do_not_tell_apart_are_numbered():
    runs = grid(["data.train=a/b.jsonl,a-b.jsonl"])

    assert [run.name for run in runs] == ["001-train=a-b.jsonl", "002-train=a-b.jsonl"]


def test_a_name_is_one_folder_whatever_the_value():
    [run] = grid(["data.train=../../etc/passwd"])

    assert "/" not in run.name


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["lora.r"], "`lora.r` is no key with values"),
        (["lora.r="], "`lora.r` has no value"),
        (["lora.r=4,,8"], "the values of `lora.r` can't be told apart"),
        (["lora.r=[4"], "the values of `lora.r` can't be told apart"),
        (["lora.r=4,4"], "`lora.r` has the value `4` twice"),
        (["lora.r=4", "lora.r=8"], "`lora.r` is given twice"),
        (["output=a,b"], "the runs of a sweep have folders of their own, by name"),
        (
            [f"training.seed={','.join(map(str, range(40)))}"] * 1 + [f"lora.r={','.join(map(str, range(1, 41)))}"],
            "the grid has 1,600 runs",
        ),
    ],
)
def test_a_mistaken_axis_is_one_problem(axes, message):
    with pytest.raises(RecipeError) as raised:
        grid(axes)

    assert [problem.what for problem in raised.value.problems] == [message]


def test_all_mistaken_axes_are_told_at_once():
    with pytest.raises(RecipeError) as raised:
        grid(["lora.r=", "lora.alpha=1,1"])

    assert len(raised.value.problems) == 2
