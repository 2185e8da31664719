"""`lora plan`: what is told is what training would take."""

import json
import subprocess
import sys

import pytest
from quantised_bases import STORAGES, quantised_base
from running import ROOT, events
from tiny import tiny_base

QLORA = ROOT / "configs" / "llama31-8b-qlora.yaml"

ONE_ROW = {"data.packing": False, "training.global_batch_size": 2, "training.micro_batch_size": 1}


def test_a_base_of_the_catalogue_is_planned_without_torch_or_its_rows():
    code = (
        "import sys; from lora_cli.cli.main import main\n"
        f"sys.argv = ['lora', 'plan', {str(QLORA)!r}, '--gpu', 'RTX 4090']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('heavy:', *sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )

    lines = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()

    assert lines[0] == "Llama-3.1-8B · r 16 · RTX 4090, 25.8 GB"
    assert "rows are not here: taken to be full, 2,048 tokens, all of them trained" in lines
    assert lines[-1] == "heavy:"


def test_the_recipe_stands_beside_what_it_is_not(lora):
    ways = lora("plan", QLORA, "--gpu", "RTX 4090", "--json").json["ways"]

    assert [way["name"] for way in ways] == ["this recipe (QLoRA nf4)", "LoRA 16 bit", "full"]
    assert [way["fits"] for way in ways] == [True, True, False]
    weights = [way["memory"]["weights"] for way in ways]
    assert weights[0] < weights[1] == weights[2] / 2  # float32 masters
    assert all(way["memory"]["needed"] > 0 for way in ways)


@pytest.mark.parametrize("gpus", [1, 4])
def test_the_cost_is_the_price_of_all_gpus_for_the_time(lora, gpus):
    found = lora("plan", QLORA, "--gpu", "H100", "--gpus", gpus, "--price", 3, "--json").json

    way = found["ways"][0]
    assert way["seconds"] == pytest.approx(found["tokens"] / way["tokens_per_second"])
    assert way["cost"] == pytest.approx(3 * gpus * way["seconds"] / 3600)


def test_more_gpus_do_the_same_work_in_less_time(lora):
    one, four = (
        lora("plan", QLORA, "--gpu", "H100", "--gpus", gpus, "--json").json["ways"][0]["seconds"] for gpus in (1, 4)
    )

    assert four == pytest.approx(one / 4, rel=0.1)


def test_a_recipe_that_fixes_its_step_is_planned_with_it(lora):
    fixed = ["--set", "training.micro_batch_size=2", "--set", "training.gradient_checkpointing=2"]

    way = lora("plan", QLORA, "--gpu", "H100", "--json", *fixed).json["ways"][0]

    assert (way["micro_batch_size"], way["gradient_checkpointing"]) == (2, 2)


def test_rows_that_are_here_are_counted(lora, recipe):
    file = recipe()

    found = lora("plan", file, "--gpu", "H100", "--json").json

    assert found["rows"]["counted"]
    assert 0 < found["rows"]["share"] < 1
    assert found["tokens"] == pytest.approx(4 * 4 * found["rows"]["mean"])  # steps × examples a step


def test_an_unknown_gpu_is_a_usage_error(lora):
    assert "is no GPU of the catalogue" in lora("plan", QLORA, "--gpu", "RTX 4900", code=2).err


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"model.dtype": "bfloat16"}),
        ("llama", {"lora.trainable_tokens": ["<s>", "<|im_end|>"]}),
        ("gpt2", {"lora.bias": "all"}),
    ],
    ids=["float32", "bfloat16", "rows of tokens", "every bias"],
)
def test_what_training_needs_is_what_was_planned_on_this_machine(name, settings, lora, recipe, tmp_path):
    """Without packing, the run's longest batch has the shape that the plan names."""
    file = recipe(settings | ONE_ROW, base=tiny_base(tmp_path / "base", name))
    lora("train", file)

    [memory] = events(tmp_path / "out", "memory")
    resolved = json.loads((tmp_path / "out" / "run.json").read_text())["resolved"]

    assert memory["step"] == 2
    assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.05)
    assert resolved["gradient_checkpointing"] is False
    assert resolved["memory"]["total"] >= memory["predicted_bytes"]
    planned = lora("plan", file, "--json").json["ways"][0]["memory"]
    assert {key: planned[key] for key in ("weights", "adapter", "gradients", "optimizer")} == {
        key: resolved["memory"][key] for key in ("weights", "adapter", "gradients", "optimizer")
    }


@pytest.mark.parametrize("storage", ["bitsandbytes nf4", "bitsandbytes int8"])
def test_a_base_quantised_on_disk_is_planned_as_it_lies_there(storage, lora, recipe, tmp_path):
    base = quantised_base(tmp_path, STORAGES[storage]())
    file, name = recipe({"training.max_steps": 2} | ONE_ROW, base=base), storage.split()[1]
    lora("train", file)

    [memory] = events(tmp_path / "out", "memory")
    ways = lora("plan", file, "--json").json["ways"]

    assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.05)
    assert [way["name"] for way in ways] == [f"this recipe (LoRA, {name} on disk)", "full"]
    assert (
        ways[0]["memory"]["weights"] < 0.75 * ways[1]["memory"]["weights"]
    )  # the head and the embeddings are most of both
    assert f"LoRA ({name})" in lora("params", file).out
    refused = lora("plan", recipe({"model.quantize": "nf4"}, base=base), code=4)
    assert "the base's are quantised already (bitsandbytes)" in refused.err


@pytest.mark.parametrize("mode", ["true", "mlp", "2"])
def test_a_checkpointed_run_trains_the_same_adapter_in_less_memory(lora, recipe, tmp_path, mode):
    file = recipe()
    lora("train", file)
    plain, [before] = (tmp_path / "out" / "adapter_model.safetensors").read_bytes(), events(tmp_path / "out", "memory")

    lora("train", file, "--overwrite", "--set", f"training.gradient_checkpointing={mode}")

    [after] = events(tmp_path / "out", "memory")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == plain
    assert after["measured_bytes"] < before["measured_bytes"]
    assert after["measured_bytes"] == pytest.approx(after["predicted_bytes"], rel=0.05)


def test_memory_that_is_short_turns_checkpointing_on_by_itself(lora, recipe, tmp_path, monkeypatch):
    file = recipe()
    lora("train", file)
    [plain] = events(tmp_path / "out", "memory")
    monkeypatch.setattr("lora_cli.runs.decision.free_host_memory", lambda: 0.4 * plain["measured_bytes"])

    lora("train", file, "--overwrite")

    [short] = events(tmp_path / "out", "memory")
    assert short["measured_bytes"] < plain["measured_bytes"]


def test_check_tells_what_a_step_needs(lora, recipe):
    out = lora("check", recipe()).out

    assert "memory      a step needs about " in out


def test_what_is_trained_whole_has_no_formula_and_is_refused(lora, recipe):
    file = recipe({"lora.modules_to_save": ["lm_head"]})

    assert (
        "there is no formula for the memory of heads and modules that are trained whole"
        in lora("plan", file, "--gpu", "H100", code=4).err
    )
