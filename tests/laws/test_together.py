"""Runs that train together over one base are the runs that each would be by itself, to rounding."""

import json
import os
import shutil
import signal

import pytest
from running import adapter_bytes, events, hashes, resumed_after, write_labelled
from same_run import AGREE, FIRST_STEP, WHOLE, assert_same_curve, assert_same_run, first_gradients
from tiny import ENCODERS, tiny_base, tiny_encoder

from lora_cli.lora.joint import JointModule
from lora_cli.train.together import Table

SHORT = WHOLE | {"training.max_steps": 3, "training.eval_steps": 2, "training.micro_batch_size": 3}


def swept(lora, file, out, *grid, together: bool, code: int = 0):
    axes = [argument for axis in grid for argument in ("--grid", axis)]
    return lora("sweep", file, *axes, "--out", out, *(["--together"] if together else []), code=code)


def runs_of(out) -> list[str]:
    return sorted(folder.name for folder in out.iterdir() if folder.is_dir())


@pytest.mark.parametrize(
    ("axis", "settings"),
    [
        ("lora.r=2,8", {}),
        ("lora.alpha=2,64", {}),
        ("training.learning_rate=1e-3,2e-2", {}),
        ("training.seed=1,2", {"lora.dropout": 0.2}),
        ("training.seed=1,2", {"data.packing": False, "training.micro_batch_size": 8}),
        ("lora.dropout=0.0,0.3", {"data.packing": False}),
        ("lora.targets=qv,all-linear", {"lora.dropout": 0.1}),
        ("lora.layers=[0],[1]", {}),
        ("lora.use_dora=true,false", {}),
        ("lora.init=default,pissa", {}),
        ("training.global_batch_size=3,8", {}),
        ("training.micro_batch_size=1,4", {}),
        ("training.gradient_checkpointing=true,false", {"lora.dropout": 0.2}),
        ("data.packing=true,false", {"lora.dropout": 0.1}),
        ("training.max_grad_norm=0.01,0", {}),
        ("data.max_length=14,128", {}),
    ],
)
def test_each_run_is_what_it_is_by_itself(axis, settings, lora, recipe, tmp_path):
    file = recipe(SHORT | settings)

    swept(lora, file, tmp_path / "together", axis, together=True)

    swept(lora, file, tmp_path / "alone", axis, together=False)
    assert len(runs_of(tmp_path / "alone")) == 2
    for name in runs_of(tmp_path / "alone"):
        assert_same_run(tmp_path / "together" / name, tmp_path / "alone" / name, steps=3)


CLASSIFY = {"training.objective": "classify", "data.train": "labelled.jsonl", "data.packing": False}
# What is changed beside or instead of linear layers: a base, and the settings of both runs, with one that differs
KINDS = {
    "head trained whole": ("llama", "lora.modules_to_save=[],[lm_head]", {}),
    "norms trained whole": ("llama", "lora.modules_to_save=[norm],[model.norm, embed_tokens]", {}),
    "a block trained whole, and adapted": ("llama", "lora.modules_to_save=[layers.1.mlp],[]", {}),
    "all biases": ("gpt2", "lora.bias=all,none", {}),
    "biases of adapted layers": ("gpt2", "lora.bias=lora_only,all", {}),
    "rows of tokens": ("llama", "lora.trainable_tokens=['?'],['?', '1']", {}),
    "rows of tokens under a tied head": ("llama-tied", "lora.trainable_tokens=['?'],[]", {}),
    "table": ("llama", "lora.r=2,4", {"lora.targets": ["embed_tokens", "q_proj"]}),
    "table and positions": ("gpt2", "lora.targets=[wte, wpe, c_attn],[c_attn]", {"data.packing": False}),
    "tied head": ("llama-tied", "lora.targets=[lm_head],[embed_tokens, lm_head]", {}),
    "experts": ("mixtral", "lora.targets=[experts.gate_up_proj, q_proj],[experts.down_proj]", {}),
    "experts, and none": ("qwen3_moe", "lora.targets=[experts.down_proj],[q_proj]", {"lora.dropout": 0.2}),
    "nf4": ("llama", "lora.bias=none", {"model.quantize": "nf4", "lora.trainable_tokens": ["?"]}),
    "int8": ("llama", "lora.r=2,4", {"model.quantize": "int8"}),
    **{
        f"classifiers on {name}": (name, "training.seed=1,2", CLASSIFY)
        for name in ("bert", "roberta", "distilbert", "llama")
    },
    "a classifier on DeBERTa's values": (
        "deberta-v2",
        "lora.r=2,4",
        CLASSIFY | {"lora.targets": ["value_proj", "output.dense"]},
    ),
    "a classifier's biases": ("bert", "lora.bias=all,none", CLASSIFY | {"lora.dropout": 0.2}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_beside_linear_layers_is_trained_together_too(kind, lora, recipe, tmp_path):
    name, axis, settings = KINDS[kind]
    write_labelled(tmp_path / "labelled.jsonl")
    base = (tiny_encoder if name in ENCODERS else tiny_base)(tmp_path / "base", name)
    file = recipe(SHORT | FIRST_STEP | {"training.max_steps": 2} | settings, base=base)

    swept(lora, file, tmp_path / "together", axis, together=True)

    for run in runs_of(tmp_path / "together"):
        lora("train", tmp_path / "together" / run / "recipe.yaml", "--out", tmp_path / "alone" / run)
        together, alone = (tmp_path / way / run for way in ("together", "alone"))
        losses = [
            [event["loss"] for event in events(out) if event["event"] in ("step", "evaluated")]
            for out in (together, alone)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=AGREE)
        mine, theirs = first_gradients(together), first_gradients(alone)
        largest = max(gradient.abs().max() for gradient in theirs.values())
        assert mine.keys() == theirs.keys()
        for parameter, gradient in theirs.items():
            # what is small beside the others is what is left of large terms, and of the rounding of these
            least = max(gradient.abs().max(), largest / 100)
            assert (mine[parameter] - gradient).abs().max() <= AGREE * least, parameter


def test_three_runs_that_differ_in_all_that_may_differ_and_stop_at_different_steps(lora, recipe, tmp_path):
    stop = {"data.eval": "20%", "training.eval_steps": 1, "training.early_stopping_patience": 1, "lora.dropout": 0.1}
    file = recipe(SHORT | stop | {"training.max_steps": 5, "training.keep_best": True})
    rates = "training.learning_rate=1e-3,0.5"  # one goes on to the end, the other soon learns nothing

    for way in (True, False):
        swept(lora, file, tmp_path / str(way), rates, "lora.r=2,6", "training.seed=1,2", together=way)

    ended = set()
    for name in runs_of(tmp_path / "False"):
        together, alone = (tmp_path / str(way) / name for way in (True, False))
        [mine], [theirs] = events(together, "finished"), events(alone, "finished")
        assert (mine["step"], mine["reason"], mine["adapter_step"]) == (
            theirs["step"],
            theirs["reason"],
            theirs["adapter_step"],
        )
        assert_same_curve(together, alone, steps=theirs["step"])
        ended.add((theirs["reason"], theirs["step"]))
    assert len(ended) > 1


def test_a_run_that_diverges_does_not_touch_the_others(lora, recipe, tmp_path):
    file = recipe(SHORT)

    swept(lora, file, tmp_path / "together", "training.learning_rate=1e30,0.02", together=True)

    swept(lora, file, tmp_path / "alone", "training.learning_rate=0.02,0.01", together=False)
    name = "learning_rate=0.02"
    assert_same_run(tmp_path / "together" / name, tmp_path / "alone" / name, steps=3)
    found = json.loads((tmp_path / "together/sweep.json").read_text())["runs"]
    assert [(run["state"], run["exit_code"]) for run in found] == [("finished", 0), ("diverged", 6)]


def test_runs_from_several_sources_tell_the_losses_of_each(lora, recipe, tmp_path):
    file = recipe(SHORT | {"data.eval": None, "training.eval_steps": None})
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "more.jsonl")

    for way in (True, False):
        swept(lora, file, tmp_path / str(way), "data.train=[train.jsonl, more.jsonl],train.jsonl", together=way)

    several = 0
    for name in runs_of(tmp_path / "False"):
        mine, theirs = (events(tmp_path / str(way) / name, "step") for way in (True, False))
        for one, other in zip(mine, theirs, strict=True):
            assert one.get("sources", {}) == pytest.approx(other.get("sources", {}), rel=AGREE)
            several += len(one.get("sources", {})) == 2
    assert several == 3


def test_what_was_killed_rejoins_and_what_has_finished_stays(lora, recipe, tmp_path):
    file = recipe(SHORT | {"training.save_steps": 1, "training.keep_checkpoints": 9, "lora.dropout": 0.1})
    out, axis = tmp_path / "out-sweep", "lora.r=2,3,4"
    swept(lora, file, tmp_path / "alone", axis, together=False)
    swept(lora, file, out, axis, together=True)
    finished = hashes(out / "r=2")

    shutil.rmtree(out / "r=4")
    resumed_after(1, out / "r=3", file, lambda *arguments: lora("sweep", *arguments[1:]), "--grid", axis, "--together")

    assert hashes(out / "r=2") == finished
    assert [event["step"] for event in events(out / "r=3", "resumed")] == [1]
    for name in runs_of(out):
        assert_same_run(out / name, tmp_path / "alone" / name, steps=3)


def test_the_same_sweep_twice_is_the_same_bytes(lora, recipe, tmp_path):
    file = recipe(SHORT | {"lora.dropout": 0.1})

    for way in ("once", "again"):
        swept(lora, file, tmp_path / way, "training.seed=1,2", together=True)

    for name in runs_of(tmp_path / "once"):
        assert adapter_bytes(tmp_path / "once" / name) == adapter_bytes(tmp_path / "again" / name)


def test_what_loosens_a_promise_is_recorded(lora, recipe, tmp_path):
    swept(lora, recipe(SHORT), tmp_path / "out", "lora.r=2,3", together=True)

    record = json.loads((tmp_path / "out/r=2/run.json").read_text())
    assert record["loosened"] == ["--together"]


@pytest.mark.parametrize(
    ("axis", "reason"),
    [
        ("model.dtype=float32,bfloat16", "different bases"),
        ("lora.targets=[value_proj],[key_proj]", "key_proj projects distances between tokens too"),
    ],
)
def test_runs_that_share_no_forward_are_refused_with_the_reason(axis, reason, lora, recipe, tmp_path, tiny_llama):
    write_labelled(tmp_path / "labelled.jsonl")
    encodes = "proj" in axis
    base = tiny_encoder(tmp_path / "base", "deberta-v2") if encodes else tiny_llama

    done = swept(
        lora, recipe(SHORT | (CLASSIFY if encodes else {}), base=base), tmp_path / "out", axis, together=True, code=2
    )

    assert reason in done.err
    assert not (tmp_path / "out").exists()


def before_forward(monkeypatch, number: int, act) -> None:
    """Call `act` before the forward of this number, of those that learn."""
    forward, done = Table._together, []

    def counted(table, wanted, *, learns):
        done.append(learns)
        if learns and sum(done) == number:
            act()
        return forward(table, wanted, learns=learns)

    monkeypatch.setattr(Table, "_together", counted)


def out_of_memory() -> None:
    raise MemoryError("no room for the rows of all runs")


def test_where_memory_runs_out_every_run_takes_the_step_again_in_smaller_forwards(lora, recipe, tmp_path, monkeypatch):
    file = recipe(SHORT | {"data.packing": False})  # several forwards a step: the second is one of the first step
    swept(lora, file, tmp_path / "alone", "lora.r=2,3", together=False)
    before_forward(monkeypatch, 2, out_of_memory)

    swept(lora, file, tmp_path / "together", "lora.r=2,3", together=True)

    for name in runs_of(tmp_path / "alone"):
        assert [event["step"] for event in events(tmp_path / "together" / name, "out_of_memory")] == [1]
        assert_same_run(tmp_path / "together" / name, tmp_path / "alone" / name, steps=3)


def test_a_signal_saves_every_run_and_they_go_on_from_there(lora, recipe, tmp_path, monkeypatch):
    file = recipe(SHORT | {"training.micro_batch_size": 8, "data.packing": False})
    swept(lora, file, tmp_path / "alone", "lora.r=2,3", together=False)
    with monkeypatch.context() as patched:
        before_forward(patched, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        done = swept(lora, file, tmp_path / "together", "lora.r=2,3", together=True, code=143)

    lora("sweep", file, "--grid", "lora.r=2,3", "--out", tmp_path / "together", "--together", "--resume")

    assert "--resume" in done.err.splitlines()[-1]
    for name in runs_of(tmp_path / "alone"):
        [stopped] = events(tmp_path / "together" / name, "interrupted")
        assert stopped["saved"] in (1, 2)  # a signal may be heard one forward late
        assert_same_run(tmp_path / "together" / name, tmp_path / "alone" / name, steps=3)


def test_what_does_not_fit_into_one_forward_goes_through_several(lora, recipe, tmp_path, monkeypatch):
    file = recipe(SHORT)
    swept(lora, file, tmp_path / "alone", "lora.r=2,3,4", together=False)
    sizes = []
    monkeypatch.setattr("lora_cli.runs.sweep._at_once", lambda runs: 2)
    monkeypatch.setattr(JointModule, "forward", watched(JointModule.forward, sizes))

    swept(lora, file, tmp_path / "together", "lora.r=2,3,4", together=True)

    assert set(sizes) == {1, 2}
    for name in runs_of(tmp_path / "alone"):
        assert_same_run(tmp_path / "together" / name, tmp_path / "alone" / name, steps=3)


def watched(forward, sizes: list[int]):
    def call(module, *args, **kwargs):
        sizes.append(len(module.groups.now))
        return forward(module, *args, **kwargs)

    return call
