import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from lora_cli.cli import console
from lora_cli.cli.params import params
from lora_cli.errors import RecipeError

app = typer.Typer()
app.command()(params)


def lora_params(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def document(*arguments: str) -> dict:
    return json.loads(lora_params(*arguments, "--json"))


RECIPE = """
model: {base: Qwen/Qwen3-0.6B}
lora: {r: 4, targets: qv, use_dora: true, rank_pattern: {v_proj: 2}, layers: [0, 1]}
data: {train: rows.jsonl}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_the_reference_figures_are_printed_as_they_are_quoted():
    assert "16,777,216 of 6,755,192,832 (0.2484 %)" in lora_params("--r", "16", "--targets", "qkvo")
    assert "4,194,304 of 6,742,609,920 (0.0622 %)" in lora_params("--r", "8", "--targets", "qv")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("model", ["GPT-3-175B", "BERT-base", "Llama-3.1-405B"])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(columns, model, monkeypatch):
    monkeypatch.setattr(console.out, "width", columns)

    lines = lora_params("--model", model).splitlines()

    assert max(map(len, lines)) <= columns
    assert all(line[0] != " " for line in lines if line)  # a cell that is folded goes on in a line of its own


def test_json_says_what_the_table_says():
    found = document("--r", "16", "--targets", "qkvo")

    assert (found["trainable"], found["total"], found["adapter_bytes"]) == (16_777_216, 6_755_192_832, 67_108_864)
    assert sum(row["parameters"] for row in found["modules"]) == found["trainable"]
    assert [method["name"] for method in found["memory"]] == ["full", "LoRA", "QLoRA (nf4)"]


def test_alpha_follows_r_unless_it_is_given():
    assert document("--r", "32")["lora"]["scale"] == 2
    assert document("--r", "32", "--alpha", "8")["lora"]["scale"] == 0.25


def test_names_between_commas_are_a_list_of_targets():
    assert [row["module"] for row in document("--targets", "q_proj,down_proj")["modules"]] == ["q_proj", "down_proj"]


def test_a_recipe_gives_the_model_and_the_adapter_and_options_come_first(recipe):
    found = document(recipe)
    changed = document(recipe, "--model", "GPT-2", "--r", "8", "--no-dora", "--targets", "all-linear")

    assert found["model"]["name"] == "Qwen3-0.6B"
    assert [(row["module"], row["r"], row["count"]) for row in found["modules"]] == [("q_proj", 4, 2), ("v_proj", 2, 2)]
    assert found["lora"]["use_dora"]
    assert {row["r"] for row in changed["modules"]} == {8}
    assert changed["model"]["name"] == "GPT-2"
    assert not changed["lora"]["use_dora"]


def test_a_recipes_revision_is_the_one_that_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "gpt2"}')
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {base: someone/tiny, revision: abc}\ndata: {train: rows.jsonl}\n")

    assert document(str(path))["model"]["source"] == str(snapshot)


def test_a_budget_finds_r_and_shows_what_it_gives():
    found = document("--targets", "qv", "--budget", "5M")

    assert found["lora"]["r"] == 9
    assert found["trainable"] == 9 * 524_288


def test_a_budget_and_a_rank_exclude_each_other():
    with pytest.raises(RecipeError, match="`--budget` finds r, and `--r` sets it"):
        lora_params("--r", "8", "--budget", "5M")


def test_a_fused_weight_is_adapted_whole_and_said_so():
    assert document("--model", "gpt2", "--targets", "qv")["notes"] == [
        "`c_attn` holds q k v in one weight: `qv` adapts the whole of it"
    ]


def test_a_rank_above_a_layers_width_is_said():
    assert "the rank is above the width of q_proj" in lora_params(
        "--model", "SmolLM2-135M", "--r", "600", "--targets", "q"
    )


def test_the_list_shows_the_catalogue():
    assert "meta-llama/Llama-2-7b-hf" in lora_params("--list")
    assert {"Llama-2-7B", "GPT-3-175B"} <= {entry["name"] for entry in document("--list")["models"]}


def test_no_heavy_library_is_loaded(recipe):
    code = (
        "import sys, typer; from lora_cli.cli.params import params; app = typer.Typer(); app.command()(params)\n"
        "app(standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", code, recipe], capture_output=True, text=True, check=True)

    assert done.stderr == "[]\n"
