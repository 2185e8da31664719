"""FSDP2: the frozen base and the adapter in shards, one transformer block whole at a time.

    block 1   [ shard of W₀, A, B ]  -- all-gather -->  forward  -->  shards again      on every process, for each block
    gradients of A and B             -- reduce-scatter in the backward of each micro-batch

torch's `fully_shard` by itself, on GPUs and CPUs alike: Accelerate ignores FSDP on a CPU, and what its wrapper adds
(optimizers, checkpoints) is ours already. A frozen 16- or 4-bit base and its float32 adapter lie in one group: only what
is trained has to be of one type.
"""

import torch
from torch import Tensor, nn

from lora_cli.errors import ModelError, Problem, RecipeError
from lora_cli.lora.shards import InShards
from lora_cli.recipe.schema import Recipe
from lora_cli.train.sharding import Sharding


def shard(model: nn.Module, sharding: Sharding, device: torch.device) -> None:
    """Shard a model that lies in host memory, block by block, onto the devices of all processes.

    No device ever holds more than its shards, one whole block, and what lies outside of the blocks. The parameters are
    new ones afterwards. Gradients come out of each backward as the sum over the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks(model, sharding.blocks):
        block.to(device)  # fully_shard would move a 4-bit weight without its scales
        block.register_forward_hook(_own_memory)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    model.__class__ = type(type(model).__name__, (InShards, type(model)), {})
    # by default the root would stay whole after a forward
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, InShards.run.__name__)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def _own_memory(block: nn.Module, inputs: object, output: object) -> object:
    """A block's output that is a view (OPT's is), copied: FSDP's backward hook on a view would be lost by an update in place."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Where each process waits for the others in a forward; none of a model that every process has whole."""
    if not isinstance(model, InShards):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def blocks(model: nn.Module, names: tuple[str, ...] = ()) -> list[nn.Module]:
    """The transformer blocks: modules of the named classes, or of those that the model itself would not split."""
    wanted = set(names) or set(getattr(model, "_no_split_modules", None) or ())
    # a block that is recomputed is of a class below its own
    found = [module for module in model.modules() if wanted & {cls.__name__ for cls in type(module).__mro__}]
    if found:
        return found
    said = ", ".join(sorted(wanted)) or "none"
    raise ModelError(
        Problem(
            f"FSDP finds no transformer blocks in {type(model).__name__}: it looks for {said}",
            fix=f"name their class in `fsdp_transformer_layer_cls_to_wrap`; the model has {_repeated(model)}",
        )
    )


def check_can_be_sharded(recipe: Recipe) -> None:
    """Raise RecipeError for what needs a parameter whole, before any weight is read."""
    problems = []
    if recipe.model.quantize == "int8":
        problems.append(
            Problem(
                "`model.quantize: int8` can't be sharded: bitsandbytes keeps its scales outside of the parameter",
                fix="use `model.quantize: nf4` or none; or data parallel, `--on ddp`",
            )
        )
    if recipe.training.optimizer != "adamw":
        problems.append(
            Problem(
                f"`training.optimizer: {recipe.training.optimizer}` can't be sharded: bitsandbytes needs whole parameters",
                fix="use `training.optimizer: adamw`, whose state is sharded too",
            )
        )
    if recipe.training.full:
        what = (
            "`training.method: full` is not sharded: it is there to compare LoRA with, on one device or with `--on ddp`"
        )
        problems.append(Problem(what, fix="use `--on ddp`, or `training.method: lora`"))
    if problems:
        raise RecipeError(*problems)


def _repeated(model: nn.Module) -> str:
    """The classes of the modules in lists: blocks are among them."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return ", ".join(sorted({type(child).__name__ for found in lists for child in found})) or "no lists of modules"
