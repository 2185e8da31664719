"""Optimizers by the recipe's names, and their state by the names of the parameters."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_cli.lora.shards import gathered, laid_out_as
from lora_cli.recipe.schema import Training

Parameters = Mapping[str, nn.Parameter]
OptimizerState = tuple[dict[str, Tensor], dict[str, dict]]


def make_optimizer(settings: Training, parameters: Parameters) -> Optimizer:
    """AdamW over the trainable parameters, fused; bitsandbytes' forms on request.

    One flat tensor of all would save 7 of 19 ms a step, with clipping (SmolLM2-135M, r = 16 on all linears, one thread of
    a CPU): a thousandth of the step.
    """
    return OPTIMIZERS[settings.optimizer](
        parameter_groups(settings, parameters), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def parameter_groups(settings: Training, parameters: Parameters) -> list[dict]:
    """The parameters by what they learn with: rate and weight decay; those that learn at `learning_rate` come first.

    B learns `loraplus_lr_ratio` times as fast as all else (LoRA+, Hayou et al. 2024, section 4). Biases don't decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        faster = settings.loraplus_lr_ratio if name.endswith("lora_B") else 1.0
        decay = 0.0 if name.endswith("bias") else settings.weight_decay
        groups.setdefault((settings.learning_rate * faster, decay), []).append(parameter)
    return [
        {"params": found, "lr": lr, "weight_decay": decay}
        for (lr, decay), found in sorted(groups.items(), key=lambda group: group[0])
    ]


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Set each group's rate to its own peak times `factor`; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return optimizer.param_groups[0]["lr"]


def optimizer_state(optimizer: Optimizer, parameters: Parameters) -> OptimizerState:
    """The optimizer's state by parameter name: tensors as `<name>/<key>`, plain numbers apart from them.

    Whole tensors on the CPU: of shards, all processes make it together.
    """
    tensors, scalars = {}, {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = gathered(value.detach()).to("cpu", copy=True).contiguous()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def restore_optimizer(
    optimizer: Optimizer, parameters: Parameters, tensors: Mapping[str, Tensor], scalars: Mapping[str, dict]
) -> None:
    """The inverse of `optimizer_state`; state tensors go where their parameter lies (a step counter stays where it was)."""
    for name, parameter in parameters.items():
        state = dict(scalars.get(name, {}))
        for key in (key for key in tensors if key.rpartition("/")[0] == name):
            tensor = tensors[key]
            state[key.rpartition("/")[2]] = _placed(tensor, parameter, counts_on_device=_fused(optimizer))
        if state:
            optimizer.state[parameter] = state


def _adamw(parameters: list[nn.Parameter], **kwargs) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **kwargs)


def _bitsandbytes(name: str) -> Callable[..., Optimizer]:
    def make(parameters: list[nn.Parameter], **kwargs) -> Optimizer:
        import bitsandbytes.optim

        return getattr(bitsandbytes.optim, name)(parameters, **kwargs)

    return make


def _placed(tensor: Tensor, parameter: Tensor, *, counts_on_device: bool) -> Tensor:
    if tensor.ndim == 0:
        return tensor.to(parameter.device) if counts_on_device else tensor
    return laid_out_as(parameter, tensor)


def _fused(optimizer: Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw": _bitsandbytes("PagedAdamW32bit"),
    "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit"),
}
