"""Stop and resume is straight through, byte for byte on the CPU."""

import itertools
import json
import shutil

import pytest
from running import adapter_bytes, events, hashes, resumed_after
from tiny import swapped_tokenizer, tiny_base

from lora_cli.train import loop

# 12 rows, 4 held out: a step of 5 rows crosses the end of an epoch in the middle
SETTINGS = {
    "training.global_batch_size": 5,
    "training.max_steps": 6,
    "training.save_steps": 2,
    "training.keep_checkpoints": 9,
    "training.eval_steps": 2,
    "training.lr_scheduler": "cosine",
    "training.warmup_ratio": 0.3,
    "lora.dropout": 0.1,
    "data.eval": "30%",
}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"lora.init": "pissa"},
        {"lora.use_dora": True, "lora.use_rslora": True},
        {"training.optimizer": "adamw_8bit"},
        {"training.gradient_checkpointing": True},
    ],
    ids=["plain", "pissa", "dora", "8bit", "recomputed"],
)
def test_a_run_resumed_in_the_middle_ends_with_the_same_bytes(changed, lora, recipe, tmp_path):
    file = recipe(SETTINGS | changed)
    lora("train", file)
    straight, curve = adapter_bytes(tmp_path / "out"), losses(tmp_path / "out")

    resumed_after(2, tmp_path / "out", file, lora)

    assert adapter_bytes(tmp_path / "out") == straight
    assert losses(tmp_path / "out") == curve
    assert [e["step"] for e in events(tmp_path / "out", "started")] == [0, 2]


def test_a_run_stopped_by_max_time_goes_on_to_the_same_bytes(lora, recipe, tmp_path, monkeypatch):
    lora("train", recipe(SETTINGS), "--out", tmp_path / "straight")

    with monkeypatch.context() as patched:
        ticks = itertools.count()
        patched.setattr(loop._Clock, "seconds", property(lambda clock: float(next(ticks))))
        lora("train", recipe(SETTINGS), "--set", "training.max_time=3s")
    stopped = events(tmp_path / "out", "finished")[-1]
    lora("train", recipe(SETTINGS), "--resume")

    assert stopped["reason"] == "max_time"
    assert 0 < stopped["step"] < 6
    assert events(tmp_path / "out", "finished")[-1]["reason"] == "all steps"
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "straight")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_continues(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    straight = adapter_bytes(tmp_path / "out")
    newest = tmp_path / "out/checkpoints/step-0000006/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])

    done = lora("train", recipe(SETTINGS), "--resume")

    fault = "step-0000006 is damaged (optimizer.safetensors is missing or cut)"
    assert f"{fault}: kept as step-0000006.damaged-1, going back to the one before" in done.err
    assert (tmp_path / "out/checkpoints/step-0000006.damaged-1/state.json").is_file()
    assert "continuing after step 4" in done.err
    assert adapter_bytes(tmp_path / "out") == straight


def test_a_finished_run_resumed_stays_as_it_is(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    before = hashes(tmp_path / "out")

    done = lora("train", recipe(SETTINGS), "--resume")

    assert "the run has finished already, at step 6, and nothing has changed: nothing to do" in done.err
    assert hashes(tmp_path / "out") == before


# What is trained beside, or instead of, linear layers: a base and settings
KINDS = {
    "experts": (
        "mixtral",
        {"lora.targets": ["experts.gate_up_proj", "experts.down_proj", "q_proj"], "lora.dropout": 0.0},
    ),
    "turned experts from OLoRA": (
        "gpt_oss",
        {"lora.targets": ["experts.down_proj"], "lora.init": "olora", "lora.dropout": 0.0},
    ),
    "table and head": ("llama-tied", {"lora.targets": ["embed_tokens", "lm_head", "q_proj"]}),
    "positions, and all biases": ("gpt2", {"lora.targets": ["wpe", "c_attn"], "lora.bias": "all"}),
    "rows of tokens, and norms": ("llama", {"lora.trainable_tokens": ["?"], "lora.modules_to_save": ["norm"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_is_resumed_to_the_same_bytes(kind, lora, recipe, tmp_path):
    name, settings = KINDS[kind]
    short = {"training.max_steps": 3, "training.save_steps": 1, "training.eval_steps": None}
    file = recipe(SETTINGS | short | settings, base=tiny_base(tmp_path / "base", name))
    lora("train", file)
    straight, curve = adapter_bytes(tmp_path / "out"), losses(tmp_path / "out")

    resumed_after(2, tmp_path / "out", file, lora)

    assert adapter_bytes(tmp_path / "out") == straight
    assert losses(tmp_path / "out") == curve


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.r", 8),
        ("lora.dropout", 0.2),
        ("training.learning_rate", 0.1),
        ("training.seed", 7),
        ("lora.init", "pissa"),
    ],
)
def test_a_changed_recipe_is_refused_by_name_and_changes_no_file(key, value, lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    before = hashes(tmp_path / "out")

    done = lora("train", recipe(SETTINGS | {key: value}), "--resume", code=2)

    assert f"`{key}` has changed since the run was started" in done.err
    assert hashes(tmp_path / "out") == before


def test_other_rows_are_refused(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    file = recipe(SETTINGS)
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write('{"prompt": "what", "completion": " the mat"}\n')

    done = lora("train", file, "--resume", code=3)

    assert "`data.train` (the training rows, as the tokenizer renders them,) has changed" in done.err


def test_what_changes_no_training_may_change(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    straight = adapter_bytes(tmp_path / "out")

    free = ("training.save_steps=3", "training.log_steps=7", "training.keep_checkpoints=3")
    resumed_after(2, tmp_path / "out", recipe(SETTINGS), lora, *(x for pair in free for x in ("--set", pair)))

    assert adapter_bytes(tmp_path / "out") == straight


@pytest.mark.parametrize(
    "changed", [{"data.packing": False, "training.micro_batch_size": 1}, {"training.rewind_on_spike": True}]
)
def test_from_every_step_it_goes_on_to_the_same_bytes(changed, lora, recipe, tmp_path):
    file = recipe(SETTINGS | changed | {"training.save_steps": 1})
    lora("train", file)
    straight, whole = adapter_bytes(tmp_path / "out"), tmp_path / "whole"
    shutil.copytree(tmp_path / "out", whole)

    for step in (1, 3, 5):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(whole, tmp_path / "out")
        resumed_after(step, tmp_path / "out", file, lora)
        assert adapter_bytes(tmp_path / "out") == straight


def test_what_was_logged_behind_the_checkpoint_is_told_once(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    log = tmp_path / "out/events.jsonl"
    with log.open("a") as file:
        file.write('{"event": "step", "st')  # killed while it wrote

    resumed_after(4, tmp_path / "out", recipe(SETTINGS), lora)

    found = [(event["event"], event["step"]) for event in events(tmp_path / "out")]
    assert found[-9:] == [
        *(("saved", 4), ("resumed", 4), ("started", 4), ("step", 5), ("memory", 5), ("step", 6)),
        *(("evaluated", 6), ("saved", 6), ("finished", 6)),
    ]
    assert len({pair for pair in found if pair[0] == "step"}) == len([pair for pair in found if pair[0] == "step"]) == 6


def test_a_change_that_is_allowed_is_printed_and_recorded(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))
    file = recipe(SETTINGS | {"training.learning_rate": 0.001})

    done = lora("train", file, "--resume", "--allow-change", "training.learning_rate")

    assert "--allow-change training.learning_rate: where it has changed, the result may be another one" in done.err
    assert "changed: training.learning_rate, 0.02 then, 0.001 now" in done.err
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["changes"] == [{"step": 6, "changed": {"training.learning_rate": [0.02, 0.001]}}]


@pytest.mark.parametrize(
    ("where", "key", "code", "text"),
    [
        ("torch.get_num_threads", "threads", 2, "`threads` (the number of threads) has changed"),
        ("torch.backends.cpu.get_cpu_capability", "cpu", 2, "`cpu` (what the processor can do) has changed"),
        ("lora_cli.runs.resume.version", "versions", 2, "torch "),
        (
            "lora_cli.runs.resume.tokenizer_fingerprint",
            "tokenizer",
            4,
            "`tokenizer` (the tokenizer or its chat template)",
        ),
    ],
)
def test_a_changed_machine_is_refused_by_name_and_can_be_allowed(
    where, key, code, text, lora, recipe, tmp_path, monkeypatch
):
    lora("train", recipe(SETTINGS))
    monkeypatch.setattr(where, lambda *_: "other")

    done = lora("train", recipe(SETTINGS), "--resume", code=code)

    assert text in done.err
    assert f"--allow-change {key}`" in done.err
    lora("train", recipe(SETTINGS), "--resume", "--allow-change", key)


def test_what_a_checkpoint_is_made_of_can_not_change_and_an_unknown_field_is_refused(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS))

    fixed = lora("train", recipe(SETTINGS | {"lora.r": 8}), "--resume", "--allow-change", "lora.r", code=2)
    unknown = lora("train", recipe(SETTINGS), "--resume", "--allow-change", "training.learning_rat", code=2)

    assert "`lora.start_from` begins it at this run's adapter" in fixed.err
    assert "fix: write `--allow-change training.learning_rate`" in unknown.err


@pytest.mark.parametrize("done", [4, 6], ids=["unfinished", "finished"])
def test_more_steps_extend_a_run_and_the_rate_follows_the_longer_schedule(done, lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS | {"training.max_steps": 10}), "--out", tmp_path / "longer")
    lora("train", recipe(SETTINGS))

    resumed_after(done, tmp_path / "out", recipe(SETTINGS | {"training.max_steps": 10}), lora)

    rates = [[event["lr"] for event in events(tmp_path / name, "step")] for name in ("out", "longer")]
    assert len(rates[0]) == 10
    assert rates[0][done:] == rates[1][done:]
    assert events(tmp_path / "out", "resumed")[0]["changed"] == {"training.max_steps": [6, 10], "steps": [6, 10]}


def test_another_base_in_the_place_of_the_runs_own_is_refused_by_name(lora, recipe, tmp_path):
    base = tiny_base(tmp_path / "base")
    file = recipe(SETTINGS, base=base)
    lora("train", file)
    resumed_after(2, tmp_path / "out", file, lora)
    before = hashes(tmp_path / "out")
    tiny_base(base, seed=9)

    done = lora("train", file, "--resume", code=4)

    assert "`model.base` (the fingerprint of the base) has changed since the run was started" in done.err
    assert "; they differ in lm_head.weight, model.embed_tokens.weight, model.layers.0.mlp.down_proj.weight" in done.err
    assert hashes(tmp_path / "out") == before


def test_fewer_steps_are_refused(lora, recipe):
    lora("train", recipe(SETTINGS))

    assert (
        "6 steps are done, and the recipe takes 5 now"
        in lora("train", recipe(SETTINGS | {"training.max_steps": 5}), "--resume", code=2).err
    )


def test_a_new_run_can_begin_at_an_adapter(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS | {"training.max_steps": 3}))

    start = {"lora.start_from": str(tmp_path / "out")}
    lora("train", recipe(SETTINGS | start), "--out", tmp_path / "next")

    first, second = (events(tmp_path / name, "evaluated") for name in ("out", "next"))
    assert second[0]["step"] == 0
    assert second[0]["loss"] == pytest.approx(first[-1]["loss"], rel=1e-6)
    assert len(events(tmp_path / "next", "step")) == 6


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"lora.r": 8}, "an adapter of rank 4 at model.layers.0.mlp.down_proj, where the recipe has 8"),
        ({"lora.alpha": 4}, "an adapter of scale 2 at model.layers.0.mlp.down_proj, where the recipe has 1"),
        ({"lora.targets": "qv"}, "an adapter of other modules: it changes model.layers.0.mlp.down_proj"),
        ({"lora.use_dora": True}, "an adapter with `use_dora: false`"),
    ],
)
def test_an_adapter_that_does_not_fit_the_recipe_is_no_start(changed, text, lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS | {"training.max_steps": 1}))

    start = {"lora.start_from": str(tmp_path / "out")}
    done = lora("train", recipe(SETTINGS | start | changed), "--out", tmp_path / "next", code=4)

    assert text in done.err
    assert not (tmp_path / "next").exists()


def test_an_adapter_of_another_base_is_no_start(lora, recipe, tmp_path):
    lora("train", recipe(SETTINGS | {"training.max_steps": 1}))
    other = tiny_base(tmp_path / "other", seed=9)

    start = {"lora.start_from": str(tmp_path / "out")}
    done = lora("train", recipe(SETTINGS | start, base=other), "--out", tmp_path / "next", code=4)

    assert "the adapter was trained on another base: they differ in lm_head.weight" in done.err
    assert "set `model.base` to the base that it was trained on" in done.err


def test_a_start_of_another_base_or_tokenizer_fails_the_preflight(lora, recipe, tmp_path, tiny_llama):
    """Before any weight is loaded, in `lora check` as in `lora train`."""
    lora("train", recipe(SETTINGS | {"training.max_steps": 1}))
    start = {"lora.start_from": str(tmp_path / "out")}
    other, retold = tiny_base(tmp_path / "other", seed=9), tiny_base(tmp_path / "retold")
    swapped_tokenizer().save_pretrained(retold)

    fine = lora("check", recipe(SETTINGS | start))
    of_base = lora("check", recipe(SETTINGS | start, base=other), code=4)
    of_tokenizer = lora("check", recipe(SETTINGS | start, base=retold), code=4)

    assert "ok    start       it begins at an adapter of this base, SHA-256 " in fine.out
    assert "fail  start       the adapter was trained on another base: they differ in lm_head.weight" in of_base.out
    assert "fail  start       this tokenizer has other tokens or other ids" in of_tokenizer.out


BEST = SETTINGS | {
    "training.keep_best": True,
    "training.lr_scheduler": "constant",
    "training.max_steps": 8,
    "data.eval": "others.jsonl",  # unlike the training rows: learning these makes those less likely
    "training.eval_steps": 1,
    "training.save_steps": None,
    "training.keep_checkpoints": 2,
}


@pytest.fixture
def others(tmp_path):
    (tmp_path / "others.jsonl").write_text('{"prompt": "7", "completion": "QXZW"}\n' * 3)


@pytest.mark.usefixtures("others")
def test_with_keep_best_the_result_is_the_adapter_of_the_lowest_held_out_loss(lora, recipe, tmp_path):
    done = lora("train", recipe(BEST))

    out = tmp_path / "out"
    best = min(events(out, "evaluated")[1:], key=lambda event: event["loss"])["step"]
    assert best < 8
    assert events(out, "finished")[0]["adapter_step"] == best
    assert f"the adapter is that of step {best}, where the held-out loss was lowest" in done.out
    assert adapter_bytes(out) == adapter_bytes(out / f"checkpoints/step-{best:07d}")
    measured = lora("eval", recipe(BEST), "--json").json["adapter"]["loss"]
    assert measured == pytest.approx(min(event["loss"] for event in events(out, "evaluated")[1:]), rel=1e-6)


@pytest.mark.usefixtures("others")
def test_the_best_checkpoint_outlives_the_rotation(lora, recipe, tmp_path):
    lora("train", recipe(BEST | {"training.save_steps": 1}))

    best = events(tmp_path / "out", "finished")[0]["adapter_step"]
    steps = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "out/checkpoints").iterdir())
    assert steps == sorted({best, 7, 8})


def losses(out) -> list[float]:
    return [event["loss"] for event in events(out, "step")]
