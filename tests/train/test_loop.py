"""The loop as a generator: what it does to gradients, and when it measures, saves and stops."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from layers import randomize, relative_difference
from looping import Run, kinds, rows, settings

from lora_cli.data.collate import collate
from lora_cli.errors import DivergedError
from lora_cli.train.events import Evaluated, Finished, Sampled, Saved, Step
from lora_cli.train.layout import Layout, micro_batches


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


class Kept(torch.optim.SGD):
    """Keeps the gradients of its last step."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)


def gradients(accelerator, size: int) -> dict[str, torch.Tensor]:
    """What the optimizer is given for one step's rows, cut into micro-batches of `size`."""
    run = Run(accelerator, layout=Layout(size), max_grad_norm=0.0)
    randomize(run.model, size=0.1)
    run.optimizer = Kept(run.parameters.values(), lr=1e-2)
    next(event for event in run.events() if isinstance(event, Step))
    return dict(zip(run.parameters, run.optimizer.gradients, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_do_not_depend_on_the_micro_batches(accelerator, size):
    whole, cut = gradients(accelerator, 8), gradients(accelerator, size)

    assert max(relative_difference(cut[name], whole[name]) for name in whole) <= 2e-6


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens(accelerator):
    run = Run(accelerator)
    nll = tokens = 0.0
    with torch.no_grad():
        for row in rows():
            ids = torch.tensor([row.input_ids])
            logps = run.model(input_ids=ids).logits[0].log_softmax(-1)
            for place in range(1, len(row.input_ids)):
                if row.weights[place]:
                    nll, tokens = nll - logps[place - 1, row.input_ids[place]].item(), tokens + 1

    step = next(event for event in run.events() if isinstance(event, Step))

    assert step.loss == pytest.approx(nll / tokens, rel=1e-6)
    assert step.tokens == tokens


def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_trained_tokens(accelerator):
    run = Run(accelerator)
    randomize(run.model, size=0.1)
    (run.task(collate([[row] for row in rows()])).total / sum(row.items for row in rows())).backward()

    found = gradients(accelerator, 2)

    assert max(relative_difference(found[name], p.grad) for name, p in run.parameters.items()) <= 2e-6


def test_each_step_has_the_rate_of_its_own_number(accelerator):
    run = Run(accelerator, rate=1e-2, schedule=lambda step: step / 10)

    rates = [event.lr for event in run.events(steps=3) if isinstance(event, Step)]

    assert rates == pytest.approx([1e-3, 2e-3, 3e-3])


def test_the_gradient_norm_told_is_that_before_clipping_and_clipping_bounds_the_step(accelerator):
    run = Run(accelerator, max_grad_norm=1e-4)
    run.optimizer = torch.optim.SGD(run.parameters.values(), lr=1.0)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}

    step = next(event for event in run.events() if isinstance(event, Step))

    moved = math.sqrt(sum((p.detach() - before[name]).pow(2).sum().item() for name, p in run.parameters.items()))
    assert step.grad_norm > 1e-3
    assert moved == pytest.approx(1e-4, rel=1e-2)


def test_max_grad_norm_0_clips_nothing(accelerator):
    norms = [
        next(e for e in Run(accelerator, max_grad_norm=m).events() if isinstance(e, Step)).grad_norm
        for m in (0.0, 1e-3)
    ]

    assert norms[0] == pytest.approx(norms[1])


def test_dropout_is_a_function_of_seed_and_step_not_of_what_was_drawn_before(accelerator):
    def losses(noise: int, seed: int = 1):
        run = Run(accelerator, dropout=0.5, seed=3)
        randomize(run.model, size=0.1)
        run.settings = settings(seed=seed)
        found = []
        for event in run.events(3):
            torch.rand(noise)
            if isinstance(event, Step):
                found.append(event.loss)
        return found

    assert losses(1) == losses(5)
    assert losses(1) != losses(1, seed=2)


def test_dropout_is_drawn_anew_at_every_step(accelerator):
    run = Run(accelerator, dropout=0.5, rate=0.0)
    randomize(run.model, size=0.1)

    losses = [event.loss for event in run.events(3) if isinstance(event, Step)]

    assert len(set(losses)) == 3  # of the same rows and the same weights


def test_it_measures_before_the_first_step_and_after_the_last_and_saves_at_the_end(accelerator):
    found = kinds(Run(accelerator, losses=[3.0, 2.0]).events(2))

    assert found == [("evaluated", 0), ("step", 1), ("step", 2), ("evaluated", 2), ("saved", 2), ("finished", 2)]


def test_it_measures_and_saves_when_due_and_not_twice_at_the_end(accelerator):
    found = kinds(Run(accelerator, losses=[3.0] * 9, eval_steps=2, save_steps=3).events(4))

    assert [step for kind, step in found if kind == "evaluated"] == [0, 2, 4]
    assert [step for kind, step in found if kind == "saved"] == [3, 4]


def test_samples_come_with_every_measurement(accelerator):
    found = [
        e for e in Run(accelerator, losses=[3.0] * 9).events(1, sample=lambda: {"p": "a"}) if isinstance(e, Sampled)
    ]

    assert [(e.step, e.samples) for e in found] == [(0, {"p": "a"}), (1, {"p": "a"})]


def test_early_stopping_counts_measurements_without_a_lower_loss(accelerator):
    run = Run(accelerator, losses=[3.0, 2.0, 2.5, 1.9, 1.9, 2.0, 1.0], eval_steps=1, patience=2)

    events = list(run.events(6))

    assert [e.best for e in events if isinstance(e, Evaluated)] == [True, True, False, True, False, False]
    assert run.saved == [5]
    assert events[-1].reason == "early stopping"
    assert run.progress.best_loss == 1.9


def test_max_time_stops_after_a_step_and_saves(accelerator):
    run = Run(accelerator, max_seconds=0.0)

    events = list(run.events(6))

    assert kinds(events) == [("step", 1), ("saved", 1), ("finished", 1)]
    assert events[-1].reason == "max_time"


def test_the_time_of_earlier_sessions_counts(accelerator):
    run = Run(accelerator, max_seconds=50.0)
    run.progress.seconds = 100.0

    assert list(run.events(6))[-1].reason == "max_time"


def test_a_resumed_run_is_not_measured_anew_before_its_first_step(accelerator):
    run = Run(accelerator, losses=[1.0])
    run.progress.step = 4

    assert kinds(run.events(5)) == [("step", 5), ("evaluated", 5), ("saved", 5), ("finished", 5)]


def test_a_step_that_is_not_finite_is_told_with_its_rows_and_never_saved(accelerator):
    run = Run(accelerator, rate=1e30, save_steps=1)

    with pytest.raises(DivergedError, match="step 4 has a loss of nan and a gradient norm of nan") as error:
        list(run.events(6))

    assert run.saved == [1]
    assert error.value.code == 6
    assert "rows:0" in error.value.problems[0].where


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_is_an_error(accelerator, loss):
    with pytest.raises(DivergedError, match=f"after step 2 the held-out loss is {loss}"):
        list(Run(accelerator, losses=[3.0, loss], eval_steps=2).events(4))


def test_every_event_is_one_json_object(accelerator):
    for event in Run(accelerator, losses=[3.0, 1000.0], eval_steps=1).events(1, sample=lambda: {"p": "a"}):
        found = json.loads(json.dumps(event.as_json()), parse_constant=lambda name: pytest.fail(name))
        assert found["event"] == event.name


def test_a_batch_with_nothing_to_learn_adds_nothing_and_still_has_a_gradient(accelerator):
    run = Run(accelerator)
    ((_, batch),) = micro_batches(rows(1), Layout(2), rank=1, processes=2)

    loss = run.task(batch)
    loss.total.backward()

    assert loss.total.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in run.parameters.values())


def test_steps_and_their_end_tell_the_peak_memory(accelerator):
    events = list(Run(accelerator).events(2))

    peaks = [event.peak_bytes for event in events if isinstance(event, Step | Finished)]
    assert len(peaks) == 3
    assert peaks == sorted(peaks)
    assert peaks[0] > 2**20
    assert isinstance(list(Run(accelerator).events(1))[-1], Finished)
    assert isinstance(list(Run(accelerator).events(1))[-2], Saved)
