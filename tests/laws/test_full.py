"""`training.method: full`: every weight of the base is trained, through the same data, loop, checkpoints and commands."""

import json

import pytest
import torch
from layers import relative_difference
from running import events, hashes, lora_workers, resumed_after
from safetensors.torch import load_file
from same_run import AGREE, assert_same_curve
from tiny import tiny_base
from transformers import AutoModelForCausalLM

from lora_cli.recipe.reader import read_recipe
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.train import prepare

FULL = {
    "training.method": "full",
    "training.learning_rate": 2e-3,
    "training.max_grad_norm": 0.0,
    "training.save_steps": 1,
    "training.keep_checkpoints": 9,
}


@pytest.fixture
def full(recipe):
    """full({"training.seed": 1, …}) -> a recipe that trains every weight, without the keys of an adapter."""

    def write(settings=None, **base):
        without = {"lora.r": 8, "lora.targets": "all-linear"}  # the defaults
        return recipe(FULL | without | (settings or {}), **base)

    return write


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("packing", [True, False])
def test_gradients_are_those_of_transformers_and_autograd(architecture, packing, lora, full, tmp_path):
    base = tiny_base(tmp_path / "base", architecture)
    every_row = {"training.global_batch_size": 12, "training.max_steps": 1, "data.packing": packing}
    file = full(every_row, base=base)

    lora("train", file)

    exact, plain = (gradients_of_transformers(base, file, dtype) for dtype in (torch.float64, torch.float32))
    moments = load_file(tmp_path / "out/checkpoints/step-0000001/optimizer.safetensors")
    ours = {name.removesuffix("/exp_avg"): 10 * m for name, m in moments.items() if name.endswith("/exp_avg")}
    assert ours.keys() == plain.keys()
    apart, rounding = (max(relative_difference(found[name], exact[name]) for name in exact) for found in (ours, plain))
    assert apart <= max(AGREE, 1.2 * rounding)  # of transformers' own float32, which Gemma 2's scales bring past 1e-6


def test_what_is_saved_is_what_was_trained_and_an_ordinary_model(lora, full, tmp_path):
    base = tiny_base(tmp_path / "base", "gpt2")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.1}))
    before = hashes(base)

    lora("train", full(base=base))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = load_file(tmp_path / "out/checkpoints/step-0000004/model.safetensors")
    found, start = dict(model.named_parameters()), dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    assert not any(torch.equal(found[name], start[name]) for name in trained)
    assert model.config.resid_pdrop == 0.1
    assert hashes(base) == before
    assert not list((tmp_path / "out").glob("adapter*"))


@pytest.mark.parametrize("changed", [{}, {"training.keep_best": True, "training.eval_steps": 1}], ids=["last", "best"])
def test_a_run_resumed_in_the_middle_ends_with_the_same_bytes(changed, lora, full, tmp_path):
    out, file = tmp_path / "out", full({"data.eval": "20%", "training.gradient_checkpointing": True} | changed)
    lora("train", file)
    straight, losses = (out / "model.safetensors").read_bytes(), [event["loss"] for event in events(out, "step")]

    resumed_after(2, out, file, lora)

    assert (out / "model.safetensors").read_bytes() == straight
    assert [event["loss"] for event in events(out, "step")] == losses
    assert "nothing to do" in lora("train", file, "--resume").err


def test_the_best_model_is_kept_where_it_is_asked_for(lora, full, tmp_path):
    best = {"training.keep_best": True, "training.eval_steps": 1, "data.eval": "20%"}
    wild = {"training.learning_rate": 0.3, "training.lr_scheduler": "constant", "training.max_steps": 5}
    lora("train", full(best | wild))

    losses = {event["step"]: event["loss"] for event in events(tmp_path / "out", "evaluated") if event["step"]}
    step = events(tmp_path / "out", "finished")[0]["adapter_step"]
    kept = load_file(tmp_path / f"out/checkpoints/step-{step:07}/model.safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    assert step == min(losses, key=losses.get) < 5
    assert all(torch.equal(found[name], kept[name]) for name in found)


def test_narrow_products_are_made_of_float32_masters(lora, full, tmp_path):
    lora("train", full(), "--out", tmp_path / "wide")

    lora("train", full({"model.dtype": "bfloat16"}), "--out", tmp_path / "narrow")

    losses = [[event["loss"] for event in events(tmp_path / name, "step")] for name in ("wide", "narrow")]
    narrow = load_file(tmp_path / "narrow/model.safetensors")
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert {tensor.dtype for tensor in narrow.values()} == {torch.float32}
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in narrow.values())


def test_two_processes_are_one(lora, full, tmp_path):
    file = full({"training.global_batch_size": 6, "training.micro_batch_size": 2, "data.eval": "20%"})
    lora("train", file, "--out", tmp_path / "one")

    lora_workers(2, "train", file, "--out", tmp_path / "two")

    assert_same_curve(tmp_path / "two", tmp_path / "one", steps=4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(relative_difference(two[name], one[name]) for name in one) <= 1e-4


def test_the_base_and_what_became_of_it_are_measured_side_by_side(lora, full, tmp_path):
    file = full({"data.eval": "20%"})
    lora("train", file)
    in_training = [event["loss"] for event in events(tmp_path / "out", "evaluated")]

    found = lora("eval", file, "--json").json
    shown = lora("eval", tmp_path / "out/recipe.yaml").out
    alone = lora("eval", "--base", tmp_path / "out", "--data", tmp_path / "train.jsonl", "--json").json

    assert [found[who]["loss"] for who in ("base", "tuned")] == pytest.approx(in_training, rel=1e-6)
    assert [line.split()[0] for line in shown.splitlines()[1:3]] == ["base", "fine-tuned"]
    assert alone["base"]["loss"] < 6


def test_an_adapter_can_be_extracted_from_the_result(lora, full, tmp_path, tiny_llama):
    lora("train", full({"training.max_steps": 12, "data.eval": "20%"}))

    lora("extract", "--base", tiny_llama, "--tuned", tmp_path / "out", "--r", 16, "--out", tmp_path / "adapter")

    found = lora("eval", tmp_path / "recipe.yaml", "--adapter", tmp_path / "adapter", "--json").json
    assert found["adapter"]["loss"] < found["base"]["loss"]


@pytest.mark.parametrize("order", ["lora,full", "full,lora"])
def test_an_adapter_beside_a_full_run_is_the_one_that_is_trained_alone(order, lora, recipe, tmp_path):
    file = recipe({"lora.r": 8, "training.max_steps": 2})
    lora("train", file, "--out", tmp_path / "alone")

    lora("sweep", file, "--grid", f"training.method={order}", "--out", tmp_path / "sweep")

    name = "adapter_model.safetensors"
    beside = (tmp_path / "sweep/method=lora" / name).read_bytes()
    assert beside == (tmp_path / "alone" / name).read_bytes()
    assert (tmp_path / "sweep/method=full/model.safetensors").is_file()


def test_what_needs_an_adapter_is_refused_at_once(lora, recipe):
    done = lora("train", recipe(FULL | {"lora.r": 4, "model.quantize": "nf4"}), code=2)

    assert "goes without `lora.r` and `model.quantize: nf4`" in done.err
    assert "set `training.method: lora`" in done.err


def test_shards_and_shared_forwards_are_refused(lora, full):
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

    [first, _] = lora_workers(2, "train", full(), code=None, **sharded)
    together = lora("sweep", full(), "--grid", "training.seed=1,2", "--together", code=2)

    assert first.code == 2
    assert "`training.method: full` is not sharded" in first.err
    assert "every weight of the base is trained" in together.err


def test_a_model_is_no_adapter_and_says_so(lora, full, tmp_path):
    lora("train", full({"training.max_steps": 1}))

    done = lora("merge", "--adapter", tmp_path / "out", code=4)

    assert "this is a whole model, and no adapter" in done.err


def test_training_that_changes_nothing_is_no_result(lora, full, tmp_path):
    done = lora("train", full({"training.learning_rate": 1e-30}), code=6)

    assert "training has changed nothing" in done.err
    assert not (tmp_path / "out/model.safetensors").exists()


def test_every_command_counts_every_weight(lora, full, tmp_path):
    file = full()

    budget = lora("params", file, "--json").json
    dry = lora("train", file, "--dry-run").out
    ways = [way["name"] for way in lora("plan", file, "--json").json["ways"]]
    lora("train", file)

    assert budget["trainable"] == budget["total"] == 36_000
    assert "trains 36,000 of 36,000 (100.0000 %) parameters" in dry
    assert ways == ["this recipe (full)", "LoRA 16 bit", "QLoRA nf4"]
    [memory] = events(tmp_path / "out", "memory")
    assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.1)
    assert "36,000 of 36,000" in (tmp_path / "out/README.md").read_text()


def gradients_of_transformers(base, recipe, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of the mean over all trained tokens, row by row, without packing, masks or code of ours."""
    rows = prepare(read_recipe(recipe), RunFolder(recipe.parent / "unused")).rows.train
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=dtype)
    trained = sum(weight > 0 for row in rows for weight in row.weights)
    for row in rows:
        labels = torch.tensor(
            [token if weight else -100 for token, weight in zip(row.input_ids, row.weights, strict=True)]
        )
        logits = model(torch.tensor([row.input_ids])).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        (loss / trained).backward()
    return {name: p.grad for name, p in model.named_parameters()}
