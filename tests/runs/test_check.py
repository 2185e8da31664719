"""Each fault that ruins a run in silence is made on purpose, and the preflight says it before any weight is read."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
from tiny import CHATML, byte_tokenizer

from lora_cli.data.render import Renderer
from lora_cli.data.types import Example, RowId
from lora_cli.errors import DataError, ModelError
from lora_cli.models.base import resolve_base
from lora_cli.models.load import load_tokenizer, skeleton
from lora_cli.recipe.reader import read_recipe
from lora_cli.runs import check as preflight
from lora_cli.runs.check import CHECKS, Facts, check
from lora_cli.runs.parts import Rows
from lora_cli.runs.rows import load_rows

TALK = {"messages": [{"role": "user", "content": "what is that"}, {"role": "assistant", "content": "the cat"}]}


@pytest.fixture
def base_with(tmp_path, tiny_llama):
    """base_with(template) -> the tiny Llama with another chat template."""

    def build(template):
        folder = tmp_path / "broken"
        shutil.copytree(tiny_llama, folder)
        byte_tokenizer(template).save_pretrained(folder)
        return folder

    return build


def write(folder, *rows, name="train.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def failed(file):
    """(check, what, code) of each failure."""
    return [(f.check, f.what, f.code) for f in check(read_recipe(file)).of("fail")]


def facts_of(file, **changed):
    """What the checks look at, as a healthy recipe has it, but for what is changed."""
    loaded = read_recipe(file)
    base = resolve_base(loaded.recipe.model.base)
    tokenizer = load_tokenizer(base.folder)
    found = Facts(loaded, tokenizer, load_rows(loaded, tokenizer), skeleton(base.folder), base=base)
    return replace(found, **changed)


def rows_with(rows, train, held_out=()):
    return Rows(list(train), list(held_out), rows.report, None)


def test_a_healthy_recipe_passes_every_check_and_is_warned_of_few_rows_and_steps(recipe):
    report = check(read_recipe(recipe({"data.eval": "25%"})))

    assert [finding.check for finding in report.findings] == [
        check.name for check in CHECKS if check.only != "classify" and check.name not in ("pairs", "start")
    ]
    assert [(finding.check, finding.what, finding.fix) for finding in report.of("warn")] == [
        (
            "steps",
            "only 4 optimizer steps in all: fewer than 50 seldom teach anything",
            "raise `training.max_steps`, or lower `training.global_batch_size`",
        ),
        (
            "rows",
            "only 9 rows to train on: fewer than 500 are soon learned by heart",
            "add rows, or watch the held-out loss with `training.eval_steps`",
        ),
    ]
    assert not report.of("fail")
    assert report.code == 0


BROKEN = {
    "asks with another header than it answers with": (
        CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>model\n' }}{% endif"),
        "the chat template does not begin an answer with its own generation prompt, so training would not see what "
        "inference puts there",
        4,
    ),
    "writes no stop token": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "the chat template ends an answer without a stop token, so the model would never learn to stop",
        4,
    ),
    "begins with BOS twice": (
        "{{ bos_token + bos_token }}" + CHATML,
        "the row begins with `<s>` twice",
        3,
    ),
    "marks nothing as generated": (
        CHATML + "{% generation %}{% endgeneration %}",
        "the `{% generation %}` blocks of the chat template hold nothing of an answer, so nothing would be trained",
        4,
    ),
}


@pytest.mark.parametrize(("template", "what", "code"), BROKEN.values(), ids=BROKEN)
def test_a_broken_template_fails(template, what, code, recipe, base_with, tmp_path):
    file = recipe(base=base_with(template))
    write(tmp_path, TALK)

    assert failed(file) == [("template" if code == 4 else "rows", what, code)]


def test_a_prompt_that_inference_renders_otherwise_fails(recipe, tmp_path):
    file = recipe()
    write(tmp_path, TALK)
    found = facts_of(file)
    [example] = found.rows.train
    other = replace(example, input_ids=[example.input_ids[1], *example.input_ids[1:]])

    with pytest.raises(ModelError) as error:
        preflight.prompts_are_those_of_inference(replace(found, rows=rows_with(found.rows, [other])))

    assert "renders a prompt for training that is not the prompt of inference" in str(error.value)
    assert "--> train.jsonl:1" in str(error.value)
    assert preflight.prompts_are_those_of_inference(found) == (
        "training prompts are inference prompts, compared on 1 answers"
    )


def test_a_trained_turn_without_a_trained_stop_token_fails(recipe):
    found = facts_of(recipe())
    first, *others = found.rows.train
    open_ended = replace(first, input_ids=first.input_ids[:-1], weights=first.weights[:-1])

    with pytest.raises(ModelError) as error:
        preflight.turns_end_on_a_stop_token(replace(found, rows=rows_with(found.rows, [open_ended, *others])))

    assert "1 trained turns end without a trained stop token" in str(error.value)
    assert f"--> {first.row}\n" in str(error.value)


def test_an_inner_turn_without_its_stop_token_fails(recipe, tmp_path):
    file = recipe()
    turns = TALK["messages"]
    write(tmp_path, {"messages": turns * 2})
    found = facts_of(file)
    [example] = found.rows.train
    inner = next(i for i, weight in enumerate(example.weights) if weight and not example.weights[i + 1])
    weights = [0.0 if i == inner else weight for i, weight in enumerate(example.weights)]

    with pytest.raises(ModelError, match="1 trained turns end without a trained stop token"):
        preflight.turns_end_on_a_stop_token(
            replace(found, rows=rows_with(found.rows, [replace(example, weights=weights)]))
        )


def test_examples_with_nothing_to_learn_fail(recipe):
    found = facts_of(recipe())
    first, *others = found.rows.train
    idle = replace(first, weights=[0.0] * len(first.weights))

    with pytest.raises(DataError, match="1 of 12 examples have nothing to learn"):
        preflight.something_is_trained(replace(found, rows=rows_with(found.rows, [idle, *others])))


def test_an_example_that_begins_with_bos_twice_fails(recipe):
    found = facts_of(recipe())
    bos = found.tokenizer.bos_token_id
    doubled = Example([bos, bos, 9], [0.0, 0.0, 1.0], RowId("train.jsonl", 3))

    with pytest.raises(DataError, match="1 examples begin with `<s>` twice"):
        preflight.begins_once(replace(found, rows=rows_with(found.rows, [doubled])))


def test_answers_that_max_length_takes_away_fail(recipe):
    [(name, what, code)] = failed(recipe({"data.max_length": 4}))

    assert (name, code) == ("rows", 3)
    assert what == "12 of 12 rows lose their whole answer to `data.max_length: 4`"


def test_answers_that_are_all_cut_before_their_stop_token_fail(recipe, tmp_path):
    file = recipe({"data.max_length": 8})
    write(tmp_path, *[{"prompt": "the cat", "completion": " sat on the mat" * 4}] * 3)

    assert failed(file) == [("stop", "`data.max_length: 8` cuts every answer before its stop token", 3)]


UNFOUND = {
    "a target": (
        {"lora.targets": ["q_prj"]},
        "`q_prj` in `lora.targets` matches no weight of this model that can get an adapter",
    ),
    "a rank": (
        {"lora.rank_pattern": {"qproj": 2}},
        "`qproj` in `lora.rank_pattern` matches no module that gets an adapter",
    ),
    "an alpha": (
        {"lora.alpha_pattern": {"x_proj": 2}},
        "`x_proj` in `lora.alpha_pattern` matches no module that gets an adapter",
    ),
}


@pytest.mark.parametrize(("settings", "what"), UNFOUND.values(), ids=UNFOUND)
def test_a_pattern_that_matches_nothing_fails(settings, what, recipe):
    assert failed(recipe(settings)) == [("targets", what, 4)]


def test_tokens_beyond_the_embeddings_fail(recipe, tiny_llama, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))

    [(name, what, code)] = failed(recipe(base=folder))

    assert (name, code) == ("vocabulary", 4)
    assert what.endswith("and the model has embeddings for 0 to 199")


def test_a_disk_without_room_for_the_checkpoints_fails(recipe, monkeypatch):
    file = recipe({"training.keep_checkpoints": 3})
    found = facts_of(file)
    paths = preflight.target_paths(found.recipe, found.model)
    needed = (1 + 2) * (3 + 1) * preflight.adapter_bytes(found.recipe, found.model, paths)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(needed))
    assert not failed(file)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(needed - 1))
    [(name, what, code)] = failed(file)

    assert (name, code) == ("disk", 5)
    assert (
        what == f"checkpoints and adapter need up to {needed / 1e6:.1f} MB, and the disk has {needed / 1e6:.1f} MB free"
    )


def test_held_out_rows_that_stand_in_train_fail_and_are_named(recipe, tmp_path):
    file = recipe({"data.eval": "eval.jsonl"})
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text(lines[3] + '{"prompt": "who", "completion": " the hat"}\n')

    [fault] = check(read_recipe(file)).of("fail")

    assert (fault.check, fault.code) == ("held-out", 3)
    assert fault.what == "1 of 2 held-out examples stand in train too"
    assert fault.where == "eval.jsonl:1 = train.jsonl:4"


@pytest.mark.parametrize(("leaked", "fails"), [(1, False), (2, True)])
def test_a_share_of_repeating_rows_may_leak_five_in_a_hundred_and_no_more(leaked, fails, recipe):
    found = facts_of(recipe({"data.eval": "25%"}))
    train = [Example([9, n], [0.0, 1.0], RowId("train.jsonl", n)) for n in range(100)]
    held_out = [Example([9, n + 100 - leaked], [0.0, 1.0], RowId("train.jsonl", n + 100)) for n in range(20)]
    given = replace(found, rows=rows_with(found.rows, train, held_out))

    if fails:
        with pytest.raises(DataError, match="2 of 20 held-out examples stand in train too"):
            preflight.held_out_rows_are_unseen(given)
    else:
        assert preflight.held_out_rows_are_unseen(given).what == "1 of 20 held-out examples stand in train too"


def test_faults_of_different_kinds_are_all_found_at_once(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(0))
    file = recipe({"data.max_length": 8, "lora.rank_pattern": {"qproj": 2}})

    assert [(name, code) for name, _, code in failed(file)] == [("rows", 3), ("targets", 4)]
    assert [code for *_, code in failed(recipe({"data.max_length": 8}))] == [3, 5]


def test_a_missing_base_is_the_only_finding(recipe):
    report = check(read_recipe(recipe({"model.base": "./nowhere"})))

    assert [(finding.check, finding.code) for finding in report.findings] == [("base", 4)]
    assert report.figures is None


def test_training_stops_at_what_check_calls_a_fault_before_it_loads_weights(recipe, lora, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("lora_cli.runs.train.load_model", load)
    file = recipe({"data.eval": "eval.jsonl"})
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "eval.jsonl")

    done = lora("train", file, code=3)

    assert "error: 12 of 12 held-out examples stand in train too" in done.err
    assert lora("check", file, code=3).out
    assert not (tmp_path / "out").exists()


def test_training_prints_the_warnings_and_renders_no_row_twice(recipe, lora, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rendered = []
    render = Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda self, item, row: rendered.append(row) or render(self, item, row))

    done = lora("train", recipe())

    assert "warning: only 4 optimizer steps in all" in done.err
    assert "warning: only 12 rows to train on" in done.err
    assert len(rendered) == len(set(rendered)) == 12
    assert lora("check", recipe()).out
    assert len(rendered) == 12


def test_the_figures_add_up(recipe, tmp_path):
    file = recipe({"data.train": ["train.jsonl", "more.jsonl"], "data.eval": "25%", "data.max_length": 24})
    row = {"prompt": "the cat", "completion": " sat on the mat"}
    write(tmp_path, row, row, row, name="more.jsonl")

    figures = check(read_recipe(file)).figures

    assert figures.train + figures.held_out == 15 == sum(bar.examples for bar in figures.histogram)
    assert [source.examples for source in figures.report.sources.values()] == [12, 3]
    assert (figures.tokens, figures.trained_tokens) == (figures.report.tokens, figures.report.trained_tokens)
    assert figures.repeats.exact == 2
    assert 0.5 < figures.filled <= 1
