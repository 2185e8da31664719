"""Each rule of the diagnosis on curves made for it: it speaks where it should, and is silent where it should be."""

import math
import random

import pytest

from lora_cli.runs.diagnosis import RULES, diagnose
from lora_cli.runs.history import history_of

SETTINGS = {
    "lora.r": 8,
    "lora.targets": "qv",
    "lora.dropout": 0.0,
    "data.eval": "5%",
    "data.packing": True,
    "training.epochs": 2,
    "training.global_batch_size": 16,
    "training.learning_rate": 2e-4,
    "training.warmup_ratio": 0.03,
}


def run(
    loss=lambda share: 2 + math.exp(-8 * share),
    held_out=lambda share: 2.1 + math.exp(-8 * share),
    *,
    steps=200,
    evaluations=9,
    noise=0.05,
    norm=lambda step: 1.0,
    speed=lambda step: 1000.0,
    tokens=20_000,
    more=(),
    finished=True,
):
    """The history of a run whose losses are functions of the share done, with noise; a healthy one by default."""
    chance = random.Random(0)
    found = [{"event": "started", "step": 0, "steps": steps}]
    places = {round(i * steps / (evaluations - 1)) for i in range(evaluations)} if evaluations > 1 else set()

    def measure(step):
        return {"event": "evaluated", "step": step, "loss": held_out(step / steps), "tokens": tokens}

    found += [measure(0)] if places else []
    for step in range(1, steps + 1):
        found.append(
            {
                "event": "step",
                "step": step,
                "loss": loss(step / steps) + chance.gauss(0, noise),
                "lr": 2e-4,
                "grad_norm": norm(step) * (1 + chance.random()),
                "tokens_per_second": speed(step),
            }
        )
        found += [measure(step)] if step in places else []
    found += more
    return history_of([*found, {"event": "finished", "step": steps, "reason": "all steps"}] if finished else found)


def record(settings=None, **blocks):
    data = {"train": {"rows": 3000, "examples": 2900, "cut_rows": 10, "cut_tokens": 100, "tokens": 90_000}}
    resolved = {"filled": 0.96, "row_length": 2048, "micro_batch_size": 4, "device": "cuda:0", "epoch_length": 1600}
    found = {"settings": SETTINGS | (settings or {}), "data": data, "resolved": resolved}
    return found | {name: found.get(name, {}) | block for name, block in blocks.items()}


def found(history, record):
    return {finding.rule: finding for finding in diagnose(history, record)}


GIB = 2**30
# rule -> (history, record, the first thing to try)
CASES = {
    "diverged": (
        run(steps=30, finished=False),
        record(result={"exit_code": 6}),
        "training.learning_rate=5e-5",
    ),
    "memory_ran_out": (
        run(more=[{"event": "out_of_memory", "step": 3}]),
        record(),
        "training.micro_batch_size=2",
    ),
    "learning_rate_too_high": (
        run(lambda share: 2 + math.exp(-8 * share) + 3 * max(0, share - 0.5)),
        record(),
        "training.learning_rate=7e-5",
    ),
    "over_fitting": (
        run(lambda share: 2.2 - 1.6 * share, lambda share: 2.3 - 0.8 * share + 1.2 * share**2),
        record(),
        "training.epochs=0.75",
    ),
    "nothing_gained": (
        run(held_out=lambda share: 2.5 + 0.1 * share, evaluations=2),
        record(),
        "training.epochs=1",
    ),
    "learning_rate_too_low": (
        run(lambda share: 3 - 0.01 * share, lambda share: 3.1 - 0.01 * share),
        record({"training.learning_rate": 1e-6}),
        "training.learning_rate=1e-5",
    ),
    "dead_modules": (
        run(),
        record(adapter={"updates": {"m.0.q_proj": 0.0, "m.1.q_proj": 0.0, "m.0.v_proj": 1.0, "m.1.v_proj": 2.0}}),
        "lora.exclude=[q_proj]",
    ),
    "skipped_steps": (
        run(more=[{"event": "skipped", "step": 7}, {"event": "skipped", "step": 9}]),
        record(),
        "training.learning_rate=1e-4",
    ),
    "too_few_steps": (run(steps=25, evaluations=3), record(), "training.global_batch_size=4"),
    "under_fitting": (run(lambda share: 3 - share, lambda share: 3.1 - share), record(), "training.epochs=4"),
    "eval_missing": (run(evaluations=0), record(), "data.eval=5%"),
    "eval_too_rare": (run(evaluations=2), record(), "training.eval_steps=20"),
    "eval_too_small": (run(tokens=300), record(), "data.eval=10%"),
    "cut_rows": (
        run(),
        record(
            data={"train": {"rows": 100, "cut_rows": 20, "cut_tokens": 500, "tokens": 900, "lengths": {"p95": 3000}}}
        ),
        "data.max_length=3000",
    ),
    "too_much_padding": (
        run(),
        record({"data.packing": False}, resolved={"filled": 0.5, "row_length": None}),
        "data.packing=true",
    ),
    "slowed_down": (run(speed=lambda step: 1000.0 if step < 100 else 400.0), record(), None),
    "memory_unused": (
        run(),
        record(
            resolved={"gradient_checkpointing": True},
            machine={"devices": [{"name": "GPU", "memory_bytes": 80 * GIB}]},
            result={"peak_bytes": 10 * GIB},
        ),
        "training.gradient_checkpointing=false",
    ),
}


def test_every_rule_has_a_case():
    assert set(CASES) == {rule.name for rule in RULES}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_speaks_on_the_curves_made_for_it(rule):
    history, about, first = CASES[rule]

    finding = found(history, about)[rule]

    assert finding.level in ("problem", "hint")
    assert any(character.isdigit() for character in finding.evidence)
    assert (finding.tries[0] if finding.tries else None) == first


@pytest.mark.parametrize("seed", range(4))
def test_a_healthy_run_hears_one_good_word(seed):
    random.seed(seed)
    history = run(noise=0.02 + 0.1 * seed)

    assert list(found(history, record())) == ["went_well"]


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_is_silent_on_a_healthy_run(rule):
    assert rule not in found(run(), record())


# What a rule must not take for its own: the curves of another
CONFUSABLE = [
    ("over_fitting", run(lambda share: 3 - share, lambda share: 3.1 - share)),
    (
        "over_fitting",
        run(held_out=lambda share: 2.1 + math.exp(-8 * share) + 0.004 * share),
    ),  # within what is noticeable
    ("under_fitting", run(lambda share: 2.2 - 1.6 * share, lambda share: 2.3 - 0.8 * share + 1.2 * share**2)),
    ("learning_rate_too_high", run(lambda share: 2.2 - 1.6 * share)),
    ("learning_rate_too_high", run(noise=0.4)),  # noise alone is no spike
    ("learning_rate_too_low", run(evaluations=0)),
    ("learning_rate_too_low", run(lambda share: 0.05, evaluations=0)),  # there was nothing to learn
    ("too_few_steps", run(steps=50)),
    ("slowed_down", run(speed=lambda step: 1000.0 + 400 * (step % 2))),
    ("memory_unused", run()),
]


@pytest.mark.parametrize(("rule", "history"), CONFUSABLE)
def test_a_rule_does_not_take_another_curve_for_its_own(rule, history):
    assert rule not in found(history, record())


def test_single_steps_that_leap_are_named():
    history = run(norm=lambda step: 500.0 if step in (60, 120, 121) else 1.0)

    finding = found(history, record())["learning_rate_too_high"]

    assert finding.evidence.startswith("3 of 200 steps leap out of their surroundings (step 60, 120, 121)")


def test_an_end_that_is_no_number_silences_what_the_curve_would_say():
    history = run(lambda share: 3 - share, steps=25, finished=False)

    assert list(found(history, record(result={"exit_code": 6}))) == ["diverged"]


def test_an_adapter_that_does_nothing_did_not_diverge():
    assert "diverged" not in found(run(), record(result={"exit_code": 6}))


def test_a_run_in_its_second_epoch_is_not_told_to_go_on_for_its_training_loss():
    """There it falls because the rows are known."""
    falling = run(lambda share: 3 - share, evaluations=2)

    assert "under_fitting" in found(falling, record(resolved={"epoch_length": 3200}))
    assert "under_fitting" not in found(falling, record(resolved={"epoch_length": 1600}))


@pytest.mark.parametrize(
    ("settings", "tries"),
    [
        ({"lora.r": 8, "lora.targets": "qv"}, ("lora.r=16", "lora.targets=qkvo")),
        ({"lora.r": 16, "lora.targets": "qkvo"}, ("lora.r=32", "lora.targets=all-linear")),
        ({"lora.r": 64, "lora.targets": "all-linear"}, ()),
        ({"lora.r": 32, "lora.targets": ["q_proj"]}, ("lora.r=64", "lora.targets=all-linear")),
    ],
)
def test_more_room_is_the_next_rank_and_the_next_targets(settings, tries):
    finding = found(run(lambda share: 3 - share, lambda share: 3.1 - share), record(settings))["under_fitting"]

    assert finding.tries == ("training.epochs=4", *tries)


@pytest.mark.parametrize("rule", [rule for rule, (_, _, first) in CASES.items() if first])
def test_what_it_says_to_try_is_a_recipe(rule, tmp_path):
    """Every advice is taken by the recipe reader, keys and values."""
    from lora_cli.recipe.reader import read_recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {base: b}\ndata: {train: t.jsonl, eval: 5%}\n")
    history, about, _ = CASES[rule]

    for each in found(history, about)[rule].tries:
        read_recipe(recipe, [each])


def test_no_events_and_no_record_are_no_reason_to_fail():
    assert diagnose(history_of([]), {}) == []


@pytest.mark.parametrize("odd", ["text", None, [], 3, {"train": "x"}, {"devices": 1, "updates": []}])
def test_a_record_of_other_types_says_less(odd):
    keys = ("settings", "data", "resolved", "machine", "result", "adapter")

    diagnose(run(), dict.fromkeys(keys, odd))
