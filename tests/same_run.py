"""Two runs compared. The measure is the contract's: largest difference ÷ largest entry, in float32."""

import pytest
from layers import relative_difference
from running import events, weights
from safetensors.torch import load_file
from torch import Tensor

AGREE = 1e-6
# Adam divides by the root of the second moment: where a gradient is nearly nothing, it magnifies rounding
AGREE_AFTER_ADAM = 1e-5
WHOLE = {"training.global_batch_size": 8, "training.max_steps": 5, "training.micro_batch_size": 8, "data.eval": "20%"}
# OLoRA starts with a B that is not zero, so that A has a gradient in the first step
FIRST_STEP = {"lora.init": "olora", "training.save_steps": 1, "training.keep_checkpoints": 9}


def assert_same_run(found, expected, *, steps: int = 5) -> None:
    """The same curve and the same adapter to rounding."""
    assert_same_curve(found, expected, steps=steps)
    assert_same_adapter(found, expected)


def assert_same_adapter(found, expected) -> None:
    mine, theirs = weights(found), weights(expected)
    assert max(relative_difference(mine[name], theirs[name]) for name in theirs) <= AGREE_AFTER_ADAM


def assert_same_curve(found, expected, *, steps: int = 5) -> None:
    pairs = list(zip(events(found, "step"), events(expected, "step"), strict=True))
    assert len(pairs) == steps
    for mine, theirs in pairs:
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=AGREE)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=AGREE)
        assert (mine["step"], mine["lr"], mine["tokens"]) == (theirs["step"], theirs["lr"], theirs["tokens"])
    for mine, theirs in zip(events(found, "evaluated"), events(expected, "evaluated"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=AGREE)


def first_gradients(out) -> dict[str, Tensor]:
    """What the optimizer saw at the first step: its first moment then is a tenth of the gradient."""
    tensors = load_file(out / "checkpoints/step-0000001/optimizer.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("/exp_avg")}


def assert_same_gradients(found, expected) -> None:
    mine, theirs = first_gradients(found), first_gradients(expected)
    assert theirs
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert theirs[name].any()
        assert relative_difference(mine[name], theirs[name]) <= AGREE
