"""The schema as a reference: each key explains itself, its defaults are valid, and the pages made from it are fresh."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from lora_cli.recipe.reader import read_recipe
from lora_cli.recipe.reference import EXAMPLE, recipe_page, recipe_schema
from lora_cli.recipe.schema import Data, LoRA, Model, Recipe, blocks, keys, seconds_of, share_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("key", keys())
def test_every_key_has_a_sentence_and_a_value_to_show(key):
    field = keys()[key]

    assert field.description[0].isupper()
    assert field.description.endswith(".")
    assert field.examples or field.default not in (None, [], {})


def test_every_default_is_within_its_own_limits():
    defaults = Recipe(model=Model(base="m"), data=Data(train="d")).model_dump()

    assert Recipe.model_validate(defaults).model_dump() == defaults


def test_every_example_is_valid():
    for key, field in keys().items():
        block, _, name = key.rpartition(".")
        for example in field.examples or []:
            needed = {field: "x" for field, info in blocks()[block].model_fields.items() if info.is_required()}
            blocks()[block].model_validate(needed | {name: example})


def test_a_recipe_cannot_be_changed():
    recipe = Recipe(model=Model(base="m"), data=Data(train="d"))

    with pytest.raises(ValidationError, match="frozen"):
        recipe.output = "elsewhere"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lora.r = 4


@pytest.mark.parametrize(
    ("block", "scale"),
    [(LoRA(), 2.0), (LoRA(r=16), 2.0), (LoRA(r=16, alpha=16), 1.0), (LoRA(r=16, use_rslora=True), 8.0)],
)
def test_alpha_defaults_to_twice_r_and_the_scale_is_that_of_the_adapter(block, scale):
    assert block.config().scale == scale


@pytest.mark.parametrize(
    ("time", "seconds"), [("45s", 45), ("90m", 5400), ("2h", 7200), ("1h30m", 5400), ("1h1m1s", 3661)]
)
def test_a_time_is_hours_minutes_and_seconds(time, seconds):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("time", ["", "2", "2 h", "h", "0s", "1.5h", "30m1h", "-1h", "2H", "٣h"])
def test_anything_else_is_no_time(time):
    with pytest.raises(ValueError, match="a time such as `2h`, `90m` or `45s`"):
        seconds_of(time)


@pytest.mark.parametrize(("source", "share"), [("5%", 0.05), ("0.5 %", 0.005), ("0%", 0), ("150%", 1.5)])
def test_a_share_is_a_number_and_a_percent_sign(source, share):
    assert share_of(source) == pytest.approx(share)


@pytest.mark.parametrize("source", ["eval.jsonl", "0.05", "%", "-5%", "5%.jsonl", "owner/5%"])
def test_a_path_or_hub_id_is_no_share(source):
    assert share_of(source) is None


# --- the pages


def test_the_generated_pages_are_fresh():
    done = subprocess.run([sys.executable, ROOT / "scripts/docs.py", "--check"], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_the_page_has_a_row_for_every_key():
    page = recipe_page()

    assert all(f"\n| `{key.rpartition('.')[2]}` | " in page for key in keys())


def test_the_example_of_the_page_is_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(EXAMPLE)

    assert read_recipe(tmp_path / "r.yaml").recipe.lora.r == 16


def test_the_editors_schema_knows_every_key_with_its_sentence_and_no_other():
    schema = recipe_schema()

    for name, block in blocks().items():
        shape = schema["$defs"][block.__name__]
        assert shape["additionalProperties"] is False
        described = {key: inner["description"] for key, inner in shape["properties"].items()}
        assert described == {key: field.description for key, field in block.model_fields.items()}, name
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema
