"""`lora check`: one page or one JSON document, the exit code of the first fault, and foreign text that stays inert."""

import json
import shutil

import pytest
from tiny import CHATML, byte_tokenizer

HOSTILE = "\x1b[2J[/bold][link=x]\u202e"


def test_a_healthy_recipe_is_one_page_and_exit_0(lora, recipe):
    done = lora("check", recipe({"data.eval": "25%"}))

    lines = done.out.splitlines()
    assert lines[0] == "ok    trained     each of 12 examples has trained tokens"
    assert "warn  steps       only 4 optimizer steps in all: fewer than 50 seldom teach anything" in lines
    assert "      fix: raise `training.max_steps`, or lower `training.global_batch_size`" in lines
    assert "rows        12 (completion); 9 examples to train on, 3 held out" in lines
    assert lines[-1] == "ready to train: 2 warnings"
    assert len(lines) < 40


def test_a_broken_template_is_said_with_its_fix_and_ends_with_its_exit_code(lora, recipe, tiny_llama, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_llama, folder)
    byte_tokenizer(CHATML.replace("assistant\n' }}{% endif", "model\n' }}{% endif")).save_pretrained(folder)
    file = recipe({"training.max_steps": 60}, base=folder)
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the cat"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")

    done = lora("check", file, "--quiet", code=4)

    assert done.out.splitlines() == [
        "fail  template    the chat template does not begin an answer with its own generation prompt, so training would "
        "not see what inference puts there",
        "        | prompt: model\\n · answer: assistant\\nthe cat<|im_end|>\\n",
        "      fix: use a tokenizer whose template renders an answer as its generation prompt and what follows",
        "",
        "not ready to train: 1 fault",
    ]


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"data.max_length": 4}, 3), ({"lora.targets": ["q_prj"]}, 4), ({"model.base": "./nowhere"}, 4)],
)
def test_the_exit_code_is_that_of_the_fault_and_of_train(settings, code, lora, recipe):
    file = recipe(settings)

    assert "not ready to train" in lora("check", file, code=code).out
    lora("train", file, code=code)


def test_a_wrong_recipe_is_exit_2(lora, recipe):
    assert lora("check", recipe({"lora.rnak": 8}), code=2).out == ""


def test_json_is_one_document_with_findings_and_figures(lora, recipe):
    found = lora("check", recipe({"data.eval": "25%"}), "--json").json

    assert (found["ready"], found["code"]) == (True, 0)
    assert {finding["level"] for finding in found["findings"]} == {"ok", "warn"}
    assert (found["figures"]["train"], found["figures"]["held_out"]) == (9, 3)
    assert found["figures"]["steps"] == 4


def test_equal_rows_are_told_from_those_that_are_almost_equal(lora, recipe, tmp_path):
    said = " ".join(map(str, range(60)))
    rows = [said, said, said + " 61", *(f"{n} {n + 1} {n + 2}" for n in range(200, 212))]
    file = recipe({})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))

    assert "1 exact, 1 near: train.jsonl:2 = train.jsonl:1, train.jsonl:3 ≈ train.jsonl:1" in lora("check", file).out


def test_json_of_a_fault_is_one_document_too(lora, recipe):
    found = lora("check", recipe({"model.base": "./nowhere"}), "--json", code=4).json

    assert (found["ready"], found["code"], found["figures"]) == (False, 4, None)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_foreign_text_stays_inert(flags, lora, recipe, tmp_path):
    name = f"{HOSTILE.replace('/', '')}.jsonl"
    file = recipe({"data.train": [name, "train.jsonl"], "data.eval": "eval.jsonl"})
    (tmp_path / name).write_text('{"prompt": "a", "completion": " b"}\n')
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')

    done = lora("check", file, *flags, code=3)

    assert "1 of 1 held-out examples stand in train too" in done.out
    assert not {"\x1b", "\u202e"} & set(done.out + done.err)
    assert "[link=x]" in done.out
