import json

import pytest

from lora_cli.budget import catalogue
from lora_cli.budget.bases import measure_base
from lora_cli.budget.catalogue import CATALOGUE
from lora_cli.budget.params import adapted_linears, budget_of
from lora_cli.budget.shapes import shape_of
from lora_cli.errors import ModelError
from lora_cli.lora.config import LoRAConfig

# parameters as their makers' own checkpoints have them
PUBLISHED = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "Phi-2": 2_779_683_840,
    "Phi-3-mini": 3_821_079_552,
    "SmolLM2-135M": 134_515_008,
    "GPT-2": 124_439_808,
    "OPT-125m": 125_239_296,
    "Falcon-7B": 6_921_720_704,
    "GPT-NeoX-20B": 20_554_567_680,
    "BERT-base": 109_482_240,
    "RoBERTa-base": 124_645_632,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_base_has_its_published_number_of_parameters(name):
    assert measure_base(name).shape.parameters == PUBLISHED[name]


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_every_row_is_found_by_its_name_and_hub_ids_in_any_case(entry):
    for name in (entry.name, *entry.hub_ids):
        assert catalogue.find(name) is entry
        assert catalogue.find(name.upper()) is entry
    assert shape_of(entry.config).parameters > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("llama-2-7b-chat-hf", "Llama-2-7B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3"),
        ("google/gemma-3-1b-it", "gemma-3-1b"),
        ("mistralai/Mixtral-8x22B-Instruct-v0.1", "Mixtral-8x22B-Instruct"),
        ("gpt2", "GPT-2"),
    ],
)
def test_a_fine_tuned_sibling_has_the_shape_of_its_base(name, expected):
    assert catalogue.find(name).name == expected


def test_another_owners_model_of_that_name_is_not_taken_for_it():
    assert catalogue.find("someone/Llama-2-7b-hf") is None


def test_gpt3_with_separate_projections_has_the_parameters_of_gpt2_at_its_size():
    gpt3 = catalogue.find("GPT-3-175B").config

    assert shape_of(gpt3).parameters == shape_of({**gpt3, "model_type": "gpt2"}).parameters


@pytest.mark.parametrize(("r", "millions"), [(1, "4.7M"), (8, "37.7M")])
def test_the_papers_gpt3_adapters_on_q_and_v_have_the_papers_sizes(r, millions):
    shape = measure_base("GPT-3-175B").shape
    lora = LoRAConfig(r=r, lora_alpha=r, target_modules=())

    budget = budget_of(adapted_linears(shape, "qv"), shape.parameters, lora)

    assert f"{budget.trainable / 1e6:.1f}M" == millions


def test_a_folder_is_measured_by_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))

    base = measure_base(str(tmp_path))

    assert base.source == str(tmp_path)
    assert base.shape.parameters == PUBLISHED["GPT-2"]


def test_a_cached_hub_id_is_measured_at_its_revision_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    for commit, layers in (("aaa", 1), ("bbb", 2)):
        (repository / "snapshots" / commit).mkdir(parents=True)
        config = {"model_type": "gpt2", "n_layer": layers}
        (repository / "snapshots" / commit / "config.json").write_text(json.dumps(config))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")

    linears = [len(measure_base("someone/tiny", revision).shape.linears) for revision in (None, "main", "aaa")]

    assert linears == [2 * 4 + 1, 2 * 4 + 1, 4 + 1]


def test_a_mistyped_name_is_answered_with_the_nearest_ones():
    with pytest.raises(ModelError) as caught:
        measure_base("lama-2-7b")

    assert str(caught.value) == (
        "error: `lama-2-7b` is neither a model's folder nor in the catalogue\n"
        "  fix: the nearest: Llama-2-7B, Llama-2-70B, Llama-3-70B; "
        "`lora params --list` shows the catalogue, and a model's folder works too"
    )


def test_an_unknown_hub_id_without_a_network_is_a_model_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(ModelError) as caught:
        measure_base("someone/unheard-of")

    what = "someone/unheard-of is neither a folder here nor in the hub's cache, and the hub can't be reached"
    assert caught.value.problems[0].what.startswith(what)


def test_an_architecture_without_a_formula_is_named_with_those_that_have_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')

    with pytest.raises(ModelError) as caught:
        measure_base(str(tmp_path))

    problem = caught.value.problems[0]
    assert problem.what == "`model_type: mamba` has no parameter formula here"
    assert problem.where == str(tmp_path / "config.json")
    assert problem.fix.startswith("known types: llama, mistral, mixtral, ")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").touch()

    with pytest.raises(ModelError, match="it is no GGUF file, or damaged"):
        measure_base(str(tmp_path / "model.gguf"))
