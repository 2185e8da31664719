"""Classification through the command line: trained, measured, resumed, merged, and read by PEFT and transformers."""

import json
import shutil

import pytest
import torch
from layers import relative_difference
from peft import PeftModelForSequenceClassification
from running import adapter_bytes, events, lora_process, weights, write_labelled
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import ENCODERS, tiny_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

# PEFT asks transformers under an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

AGREE = 1e-6
# Adam divides by the root of the second moment: where a gradient is nearly nothing, it magnifies rounding
AGREE_AFTER_ADAM = 1e-4
CLASSIFY = {
    "training.objective": "classify",
    "data.train": "labelled.jsonl",
    "data.eval": "25%",
    "lora.targets": "qv",
    "training.global_batch_size": 8,
    "training.max_steps": 5,
}
LEARNING = {"training.max_steps": 40, "training.learning_rate": 0.01, "lora.targets": "all-linear"}
LABELS = ["animal", "place", "thing"]
TEXTS = ["the cat sat", "what is the answer to that question", "hat"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folder of each tiny encoder, made once."""
    return {name: tiny_encoder(tmp_path_factory.mktemp(name), name) for name in ENCODERS}


@pytest.fixture
def classifier(recipe, tmp_path, bases, tiny_llama):
    """classifier({…}, base="bert") -> a recipe of labelled rows."""

    def write(settings=None, *, base="bert"):
        write_labelled(tmp_path / "labelled.jsonl")
        return recipe(CLASSIFY | (settings or {}), base=(bases | {"llama": tiny_llama})[base])

    return write


def logits(model, tokenizer) -> torch.Tensor:
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("base", [*ENCODERS, "llama"])
def test_what_is_trained_is_what_peft_and_transformers_read(base, classifier, lora, tmp_path, bases, tiny_llama):
    folder = (bases | {"llama": tiny_llama})[base]
    lora("train", classifier(base=base))

    merged = lora("merge", "--adapter", tmp_path / "out", "--json").json
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.config.pad_token_id = tokenizer.pad_token_id
    theirs = logits(PeftModelForSequenceClassification.from_pretrained(model, tmp_path / "out"), tokenizer)
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/merged", output_loading_info=True)

    assert relative_difference(logits(ours[0], tokenizer), theirs) <= AGREE_AFTER_ADAM
    assert not ours[1]["missing_keys"]
    assert not ours[1]["unexpected_keys"]
    assert ours[0].config.id2label == dict(enumerate(LABELS))
    assert ours[0].config.pad_token_id == 0
    assert merged["proof"]["position"] == "row"
    assert merged["proof"]["kl"] < 1e-9 < merged["proof"]["adapter_kl"]


def test_the_files_are_those_of_peft(classifier, lora, tmp_path):
    lora("train", classifier(base="distilbert"))

    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    names = {name for name in weights(tmp_path / "out") if "lora_" not in name}
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier", "pre_classifier"]
    assert names == {
        f"base_model.model.{module}.{kind}"
        for module in ("pre_classifier", "classifier")
        for kind in ("weight", "bias")
    }
    with safe_open(tmp_path / "out/adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora.labels"]) == LABELS


def test_peft_reads_its_own_names_without_a_warning_left(classifier, lora, tmp_path, bases):
    """Missing and unexpected keys are warnings in PEFT, and warnings are errors in these tests; here they are counted."""
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    lora("train", classifier())
    model = AutoModelForSequenceClassification.from_pretrained(bases["bert"], num_labels=3)
    theirs = PeftModelForSequenceClassification.from_pretrained(model, tmp_path / "out")

    found = set_peft_model_state_dict(theirs, load_peft_weights(str(tmp_path / "out")))

    assert not [key for key in found.missing_keys if "lora_" in key or "modules_to_save" in key]
    assert found.unexpected_keys == []


def test_metrics_are_in_the_events_and_equal_to_those_of_eval(classifier, lora, tmp_path):
    file = classifier(LEARNING | {"training.eval_steps": 20})
    lora("train", file)

    measured = lora("eval", file, "--json").json

    found = events(tmp_path / "out", "evaluated")
    assert ["perplexity" in event for event in found] == [False] * 3
    assert found[-1]["tokens"] == measured["rows"] == 6
    figures = {key: found[-1][key] for key in ("loss", "accuracy", "macro_f1")}
    assert measured["adapter"] == pytest.approx(figures, rel=1e-6)
    assert measured["majority"]["accuracy"] <= 0.5 < 0.8 < measured["adapter"]["accuracy"]
    assert "base" not in measured, "an untrained head says nothing"


def test_eval_shows_the_largest_class_as_the_baseline(classifier, lora, tmp_path):
    lora("train", classifier({"training.max_steps": 20}))
    rows = [{"text": f"the hat {i}", "label": "thing"} for i in range(3)] + [{"text": "a cat", "label": "animal"}]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    done = lora("eval", "--adapter", tmp_path / "out", "--data", tmp_path / "new.jsonl")

    lines = done.out.splitlines()
    assert lines[0].split() == ["loss", "accuracy", "macro-F1"]
    assert lines[1].split() == ["always", "thing", "–", "0.7500", "0.4286"]
    assert lines[2].startswith("base + adapter")
    assert lines[-1] == "4 rows, 3 labels; the most common one is the baseline"


def test_a_merged_classifier_is_measured_as_a_base_of_its_own(classifier, lora, tmp_path):
    file = classifier({"training.max_steps": 20})
    lora("train", file)
    lora("merge", "--adapter", tmp_path / "out")
    rows = tmp_path / "labelled.jsonl"

    of_adapter = lora("eval", "--adapter", tmp_path / "out", "--data", rows, "--json").json["adapter"]
    of_merged = lora("eval", "--base", tmp_path / "out/merged", "--data", rows, "--json").json["base"]

    assert of_merged == pytest.approx(of_adapter, rel=1e-5)


EVERY_STEP = {"training.save_steps": 1, "training.keep_checkpoints": 9}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_eight_rows_are_eight_rows_however_they_are_cut(size, classifier, lora, tmp_path):
    lora("train", classifier(EVERY_STEP | {"training.micro_batch_size": 8}), "--out", tmp_path / "whole")

    lora("train", classifier(EVERY_STEP | {"training.micro_batch_size": size}), "--out", tmp_path / "cut")

    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_two_processes_are_one(classifier, lora, tmp_path):
    """With 7 rows a step, one process has a row less than the other."""
    settings = EVERY_STEP | {"training.global_batch_size": 7, "training.micro_batch_size": 2}
    lora("train", classifier(settings), "--out", tmp_path / "one")

    lora_process("train", classifier(settings), "--out", tmp_path / "two", "--processes", 2)

    assert events(tmp_path / "two", "started")[0]["processes"] == 2
    assert_same_run(tmp_path / "two", tmp_path / "one")


def first_gradients(out) -> dict[str, torch.Tensor]:
    """What the optimizer saw at the first step, where it is not zero as that of every A is beside a B of zero."""
    tensors = load_file(out / "checkpoints/step-0000001/optimizer.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("/exp_avg") and tensor.any()}


def assert_same_run(found, expected) -> None:
    mine, theirs = first_gradients(found), first_gradients(expected)
    assert len(mine) == len(theirs) == 4 + 2, "every B, and weight and bias of the head"
    assert max(relative_difference(mine[name], theirs[name]) for name in theirs) <= AGREE
    for mine, theirs in zip(events(found, "step"), events(expected, "step"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=AGREE)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=AGREE)
    for mine, theirs in zip(events(found, "evaluated"), events(expected, "evaluated"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=AGREE)
        assert (mine["accuracy"], mine["macro_f1"]) == (theirs["accuracy"], theirs["macro_f1"])
    mine, theirs = weights(found), weights(expected)
    assert max(relative_difference(mine[name], theirs[name]) for name in theirs) <= AGREE_AFTER_ADAM


def test_the_same_recipe_twice_is_the_same_bytes(classifier, lora, tmp_path):
    for name in ("a", "b"):
        lora("train", classifier({"lora.dropout": 0.1}), "--out", tmp_path / name)

    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


@pytest.mark.parametrize("changed", [{}, {"lora.modules_to_save": ["LayerNorm"]}], ids=["head", "head+norms"])
def test_a_run_resumed_in_the_middle_ends_with_the_same_bytes(changed, classifier, lora, tmp_path):
    file, out = classifier(changed | EVERY_STEP | {"lora.dropout": 0.1}), tmp_path / "out"
    lora("train", file)
    straight, losses = adapter_bytes(out), [event["loss"] for event in events(out, "step")]

    for step in (3, 4, 5):  # as if it had been killed behind the second
        shutil.rmtree(out / f"checkpoints/step-000000{step}")
    lora("train", file, "--resume")

    assert adapter_bytes(out) == straight
    assert [event["loss"] for event in events(out, "step")] == losses


def test_a_checkpoint_holds_the_head_and_what_the_optimizer_knows_of_it(classifier, lora, tmp_path):
    lora("train", classifier(EVERY_STEP))

    folder = tmp_path / "out/checkpoints/step-0000002"
    assert "base_model.model.classifier.weight" in load_file(folder / "adapter_model.safetensors")
    assert "classifier.trained.weight/exp_avg" in load_file(folder / "optimizer.safetensors")


def test_pairs_labels_of_the_recipe_and_bfloat16_go_all_the_way(classifier, lora, tmp_path):
    objective = {"kind": "classify", "labels": ["thing", "place", "animal"]}
    file = classifier({"training.objective": objective, "model.dtype": "bfloat16"})
    rows = [json.loads(line) for line in (tmp_path / "labelled.jsonl").read_text().splitlines()]
    pairs = [row | {"text_pair": f"is that {row['label']}"} for row in rows]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))

    lora("train", file)
    lora("eval", file)
    merged = lora("merge", "--adapter", tmp_path / "out", "--dtype", "bfloat16", "--json").json

    assert merged["dtypes"] == ["bfloat16"]
    config = json.loads((tmp_path / "out/merged/config.json").read_text())
    assert config["label2id"] == {"thing": 0, "place": 1, "animal": 2}
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_a_base_in_four_bits_carries_a_head_in_full(classifier, lora, tmp_path):
    file = classifier({"model.quantize": "nf4"}, base="llama")

    lora("train", file)
    measured = lora("eval", file, "--json").json

    assert measured["adapter"]["loss"] == pytest.approx(events(tmp_path / "out", "evaluated")[-1]["loss"], rel=1e-4)


def test_an_unmerge_of_a_head_is_refused(classifier, lora, tmp_path):
    lora("train", classifier())
    lora("merge", "--adapter", tmp_path / "out")

    done = lora(
        "unmerge", "--merged", tmp_path / "out/merged", "--adapter", tmp_path / "out", "--out", tmp_path / "b", code=4
    )

    assert "can't be taken off again: the merge wrote classifier over the base's own" in done.err


def test_generate_says_what_a_classifier_is_for(classifier, lora, tmp_path):
    lora("train", classifier())

    done = lora("generate", "--adapter", tmp_path / "out", "--prompt", "what", code=4)

    assert "error: a classifier writes no answers: it knows the 3 labels animal, place, thing" in done.err


def test_held_out_rows_of_another_label_are_named(classifier, lora, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"text": "a", "label": "thing"}\n{"text": "b", "label": "else"}\n')

    done = lora("train", classifier({"data.eval": "eval.jsonl"}), code=3)

    assert done.err.splitlines()[-3:] == [
        "error: `else` is none of the labels that are learned: `animal`, `place`, `thing`",
        "  --> eval.jsonl:2",
        "  fix: train on rows with it, or take the row out",
    ]


def test_a_single_label_is_an_error(classifier, lora, tmp_path):
    file = classifier({"data.eval": None})
    (tmp_path / "labelled.jsonl").write_text('{"text": "a", "label": "thing"}\n' * 8)

    done = lora("train", file, code=3)

    assert "error: every training row has the label `thing`" in done.err


def test_a_held_out_label_that_the_share_took_away_is_named(classifier, lora, tmp_path):
    file = classifier()
    with (tmp_path / "labelled.jsonl").open("a") as rows:
        rows.writelines(json.dumps({"text": f"only {i}", "label": f"only {i}"}) + "\n" for i in range(8))

    done = lora("train", file, code=3)

    assert "and no training row has it" in done.err
    assert "--> labelled.jsonl:" in done.err


def test_check_counts_the_labels_and_warns_of_a_rare_one(classifier, lora, tmp_path):
    file = classifier({"data.eval": None})
    with (tmp_path / "labelled.jsonl").open("a") as rows:
        rows.writelines(json.dumps({"text": f"the hat {i}", "label": "thing"}) + "\n" for i in range(90))

    lines = lora("check", file).out.splitlines()

    assert "ok    trained     each of 114 examples has a label to learn" in lines
    assert "warn  labels      86% of the training rows have the label `thing`, and 8 have `place`" in lines
    assert "label       thing: 98 (86.0%)" in lines
    assert "ok    targets     4 modules get an adapter, trained whole: classifier" in lines
    assert not [line for line in lines if line.split()[1:2] in (["stop"], ["template"])]


def test_data_shows_the_label_of_a_row(classifier, lora):
    file = classifier()

    shown = lora("data", file, "--row", 2).out
    found = lora("data", file, "--row", 2, "--json").json["examples"][0]
    packed = lora("data", file, "--packed").out

    assert shown.startswith("─── labelled.jsonl:2 · ")
    assert "· label place · cut 0" in shown
    assert "⟦" not in shown, "no token is learned"
    assert found["label"] == "place"
    assert packed.startswith("═══ step 1 · row 1 of 8 · 1 document · ")


def test_params_counts_what_training_trains(classifier, lora, tmp_path):
    file = classifier({"lora.modules_to_save": ["LayerNorm"]})
    lora("train", file)

    budget = lora("params", file, "--json").json

    found = json.loads((tmp_path / "out/run.json").read_text())["parameters"]
    assert budget["trainable"] == found["trainable"] == events(tmp_path / "out", "started")[0]["parameters"]
    assert budget["model"]["parameters"] == found["base"]
    assert budget["trainable"] == sum(tensor.numel() for tensor in weights(tmp_path / "out").values())
    assert {module["module"]: module["new"] for module in budget["whole"]}["classifier"]
    assert budget["total"] == found["base"] + sum(
        t.numel() for name, t in weights(tmp_path / "out").items() if "lora_" in name or "classifier" in name
    )


def test_packing_that_is_asked_for_is_said_not_to_be(classifier, lora):
    done = lora("train", classifier({"data.packing": True}))

    assert "rows are not packed: each is classified by itself" in done.err


def test_modules_trained_whole_go_into_a_merge(lora, recipe, tmp_path, tiny_llama):
    lora("train", recipe({"lora.modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}))

    merged = lora("merge", "--adapter", tmp_path / "out", "--json").json

    written, base = load_file(tmp_path / "out/merged/model.safetensors"), load_file(tiny_llama / "model.safetensors")
    trained = weights(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(written[name], trained[f"base_model.model.{name}"])
        assert not torch.equal(written[name], base[name])
    assert merged["whole"] == ["lm_head", "model.embed_tokens", "model.norm"]
    assert merged["proof"]["largest_logit_difference"] < 1e-5


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"data.format": "text"}, "reads rows with a label, and `data.format: text` has none"),
        ({"data.template": "{text}[[{label}]]"}, "`data.template` mean nothing there"),
        ({"training.sample_prompts": ["what"]}, "`training.sample_prompts` mean nothing there"),
        ({"training.objective": {"kind": "classify", "labels": ["a", "a"]}}, "names `a` twice"),
        ({"training.objective": {"kind": "classify", "lables": ["a", "b"]}}, "rename it to `labels`"),
        ({"training.objective": {"labels": ["a", "b"]}}, "`training.objective.kind` is needed"),
        ({"training.objective": {"kind": "classify", "labels": ["a"]}}, "`training.objective.labels`"),
        ({"training.objective": "sft", "data.format": "labelled"}, "is not `classify`"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(settings, what, classifier, lora):
    assert what in lora("train", classifier(settings), code=2).err


def test_a_new_run_begins_at_the_head_of_another(classifier, lora, tmp_path):
    lora("train", classifier({"data.eval": "25%"}), "--out", tmp_path / "first")
    last = events(tmp_path / "first", "evaluated")[-1]

    lora("train", classifier({"lora.start_from": str(tmp_path / "first")}), "--out", tmp_path / "second")

    first = events(tmp_path / "second", "evaluated")[0]
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert first["accuracy"] == last["accuracy"]


def test_an_adapter_of_other_labels_is_no_start(classifier, lora, tmp_path):
    lora("train", classifier(), "--out", tmp_path / "first")
    objective = {"kind": "classify", "labels": ["thing", "animal", "place"]}

    done = lora(
        "train",
        classifier({"lora.start_from": str(tmp_path / "first"), "training.objective": objective}),
        "--out",
        tmp_path / "second",
        code=4,
    )

    assert "with the labels animal, place, thing, where the rows have thing, animal, place" in done.err


def test_sources_have_a_loss_each(classifier, lora, tmp_path):
    file = classifier({"data.train": ["labelled.jsonl", "more.jsonl"]})
    rows = [{"text": f"so {i} that {word}", "label": LABELS[i % 3]} for i, word in enumerate("abcdefghijkl")]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    lora("train", file)

    step, evaluated = events(tmp_path / "out", "step")[0], events(tmp_path / "out", "evaluated")[0]
    assert set(evaluated["sources"]) == {"labelled.jsonl", "more.jsonl"}
    assert min(step["sources"].values()) <= step["loss"] <= max(step["sources"].values())


def test_the_page_and_the_card_tell_of_a_classifier(classifier, lora, tmp_path):
    lora("train", classifier())

    card, page = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained(" in card
    assert ", num_labels=3)" in card
    assert "lora generate" not in card
    assert "| accuracy |" in card.replace("macro\\_f1", "")
    assert "perplexity" not in card + page
    assert "animal 8, place 8, thing 8" in page
