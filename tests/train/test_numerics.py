"""Steps that are not finite or spike: left out, named, counted, and too many of them end the run."""

import math

import pytest
import torch
from accelerate import Accelerator
from layers import randomize
from looping import Run, kinds, rows

from lora_cli.errors import DivergedError
from lora_cli.train import numerics, rewind
from lora_cli.train.events import Skipped, Spike, Step
from lora_cli.train.progress import Progress
from lora_cli.train.rewind import Rewind


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def faulty(run: Run, steps: dict[int, float]) -> Run:
    """The run with a loss that is multiplied in these steps, in the forward that holds the last row."""
    plain, count = run.task.objective, 0

    def objective(model, batch):
        nonlocal count
        loss = plain(model, batch)
        factor = steps.get(count // 4 + 1, 1.0) if count % 4 == 3 else 1.0  # 8 rows, 2 a forward, the longest last
        count += 1
        return loss._replace(total=loss.total * factor)

    run.task.objective = objective
    return run


def test_a_loss_that_is_not_finite_leaves_weights_and_optimizer_alone_and_names_its_rows(accelerator):
    run = faulty(Run(accelerator, save_steps=1), {3: math.nan})
    seen = {}
    for event in run.events(4):
        seen[event.name, event.step] = {name: p.detach().clone() for name, p in run.parameters.items()}
        if isinstance(event, Skipped):
            skipped = event

    assert list(seen) == [
        ("step", 1),
        ("saved", 1),
        ("step", 2),
        ("saved", 2),
        ("skipped", 3),
        ("step", 4),
        ("saved", 4),
        ("finished", 4),
    ]
    assert all(torch.equal(seen["skipped", 3][name], seen["step", 2][name]) for name in run.parameters)
    assert skipped.reason == "a loss of nan and a gradient norm of nan"
    assert skipped.rows == "rows:6, rows:7"
    assert run.progress.skipped == [3]
    assert run.progress.tokens == 3 * sum(sum(row.weights) for row in rows())


def test_a_gradient_that_is_not_finite_counts_as_much_as_a_loss(accelerator):
    run = Run(accelerator)
    hooked = next(iter(run.parameters.values()))
    hooked.register_hook(lambda gradient: gradient * (math.inf if run.progress.step == 1 else 1.0))

    assert kinds(run.events(3)) == [("step", 1), ("skipped", 2), ("step", 3), ("saved", 3), ("finished", 3)]


@pytest.mark.parametrize(
    ("steps", "text"),
    [({3, 4, 5}, "3 steps in a row could not be applied: step 5"), ({1, 3, 5, 7, 9}, "5 of the last 1,000 steps")],
)
def test_too_many_end_the_run(steps, text, accelerator):
    run = faulty(Run(accelerator), dict.fromkeys(steps, math.nan))

    with pytest.raises(DivergedError, match=text) as error:
        list(run.events(20))

    problem = error.value.problems[0]
    assert "at a learning rate of 0.01" in problem.what
    assert problem.where.startswith("rows:0, rows:1")
    assert problem.fix == "lower `training.learning_rate`, or look at these rows; the last checkpoint is untouched"


def test_what_was_left_out_long_ago_is_forgotten():
    assert numerics.with_step([5, 900, 1500], 1900) == [1500, 1900]


def test_a_spike_is_applied_and_told_with_its_rows(accelerator):
    run = faulty(Run(accelerator, rate=1e-4), {18: 1e4})

    spikes = [event for event in run.events(20) if isinstance(event, Spike)]

    assert [event.step for event in spikes] == [18]
    assert spikes[0].grad_norm > 20 * spikes[0].median
    assert spikes[0].rows.startswith("rows:0, ")


def test_a_norm_is_no_spike_before_there_is_anything_to_compare_it_with():
    assert not numerics.is_spike(1e9, Progress(grad_norms=[1.0] * 15))
    assert numerics.is_spike(21.0, Progress(grad_norms=[1.0] * 16))
    assert not numerics.is_spike(19.0, Progress(grad_norms=[1.0] * 16))


def test_with_rewinding_a_spike_takes_the_weights_back_to_the_snapshot(accelerator, monkeypatch):
    monkeypatch.setattr(rewind, "EVERY", 8)
    run = faulty(Run(accelerator, rate=1e-4), {18: 1e4})
    run.rewind = Rewind()
    seen = {}
    for event in run.events(19):
        seen[event.name, event.step] = {name: p.detach().clone() for name, p in run.parameters.items()}
        if isinstance(event, Skipped):
            skipped = event

    assert (skipped.step, skipped.rewound_to) == (18, 16)
    assert all(torch.equal(seen["skipped", 18][name], seen["step", 16][name]) for name in run.parameters)
    assert ("step", 19) in seen


def test_a_run_that_is_asked_to_stop_stands_behind_its_last_whole_step(accelerator):
    run = Run(accelerator)
    randomize(run.model, size=0.1)
    found = []
    for event in run.events(9):
        found.append(event)
        run.stop = isinstance(event, Step) and event.step == 2

    assert kinds(found) == [("step", 1), ("step", 2), ("saved", 2), ("interrupted", 2)]
    assert found[-1].saved == 2
