"""Those that `bench.py` measures, one function each: (setting, turns) -> None. Each trains on the same rows, in a process of its own.

All have r = 16 and alpha = 16 on every linear layer, the same A at the start, AdamW at one rate, gradients clipped at 1, and
a loss that is divided by the trained tokens of the step; so their losses must be the same, step by step.
"""

import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import sqrt
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_cli.data.collate import collate
from lora_cli.data.types import IGNORE, Batch, Example
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import generator_for, inject
from lora_cli.lora.targets import ALL_LINEAR, choose_targets
from lora_cli.lora.weights import weights_of
from lora_cli.models.base import Base
from lora_cli.models.load import by_name_alone, load_model
from lora_cli.models.quiet import quiet_transformers
from lora_cli.models.recompute import EVERY_BLOCK, checkpoint_activations
from lora_cli.objectives.sft import sft
from lora_cli.recipe.schema import Training
from lora_cli.train.layout import Layout, micro_batches
from lora_cli.train.optim import make_optimizer
from lora_cli.train.parallel import make_accelerator
from lora_cli.train.task import Learning, Task

R, RATE, SEED = 16, 5e-4, 0
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of a Llama: all linears


@dataclass(frozen=True)
class Setting:
    """What all contestants train: `folder` holds the base, `steps` the rows of each step, padded to forwards of `size`."""

    folder: Path
    dtype: torch.dtype
    steps: Sequence[Sequence[Example]]
    size: int  # rows of a padded forward
    packed: int  # tokens of a packed row
    tokens: int  # of a packed forward
    device: str = "cpu"
    checkpointing: bool = False


@dataclass
class Turns:
    """A contestant's side of the pipe: it waits for its turn, and tells how long a step took and what its loss was."""

    pipe: Connection
    device: str
    began: float = 0.0

    def begin(self) -> None:
        if self.pipe.recv() == "forget the peak":  # of loading, and of what warms up
            _forget_peak(self.device)
        self.began = self._now()

    def end(self, loss: float) -> None:
        self.pipe.send((self._now() - self.began, loss, _peak_bytes(self.device)))

    def _now(self) -> float:
        """Processor time of this process, which other work disturbs least; on a GPU, time, once it is done."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def lora_packed(setting: Setting, turns: Turns) -> None:
    _lora(setting, turns, lambda rows: _packed(rows, setting))


def full(setting: Setting, turns: Turns) -> None:
    """`training.method: full`, in float32, on the batches of `lora_packed`; its losses are its own."""
    model = load_model(Base("base", setting.folder), dtype=torch.float32, device=setting.device).requires_grad_(True)
    _ours(model, setting, turns, lambda rows: _packed(rows, setting))


def lora_by_length(setting: Setting, turns: Turns) -> None:
    _lora(setting, turns, lambda rows: _laid_out(rows, Layout(setting.size)))


def lora_padded(setting: Setting, turns: Turns) -> None:
    _lora(setting, turns, lambda rows: padded(rows, setting.size))


def peft(setting: Setting, turns: Turns) -> None:
    """The loop that PEFT's documentation shows."""
    from peft import LoraConfig, get_peft_model

    model = _plain_base(setting)
    config = LoraConfig(r=R, lora_alpha=R, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    _loop(get_peft_model(model, config), setting, turns)


def peft_with_liger(setting: Setting, turns: Turns) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    peft(setting, turns)


def unsloth(setting: Setting, turns: Turns) -> None:
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    from unsloth import FastLanguageModel

    longest = max(len(row.input_ids) for rows in setting.steps for row in rows)
    model, _ = FastLanguageModel.from_pretrained(
        str(setting.folder), max_seq_length=longest, dtype=setting.dtype, load_in_4bit=False, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=R,
        lora_alpha=R,
        target_modules=PROJECTIONS,
        lora_dropout=0,
        use_gradient_checkpointing="unsloth" if setting.checkpointing else False,
    )
    FastLanguageModel.for_training(model)
    _loop(model, setting, turns)


def trl(setting: Setting, turns: Turns) -> None:
    """SFTTrainer, padded as it is by default."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class TakesTurns(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            turns.begin()

        def on_log(self, *_, logs: dict, **__) -> None:
            if "loss" in logs:
                turns.end(logs["loss"])

    model = get_peft_model(
        _plain_base(setting),
        LoraConfig(r=R, lora_alpha=R, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
    )
    _start_alike(model)
    rows = [row for rows in setting.steps for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_length=None,
            max_steps=len(setting.steps),
            per_device_train_batch_size=setting.size,
            gradient_accumulation_steps=len(setting.steps[0]) // setting.size,
            train_sampling_strategy="sequential",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_checkpointing=setting.checkpointing,
            bf16=False,  # the weights' own type, and no autocast beside it
            use_cpu=setting.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list([{"input_ids": row.input_ids, "labels": _labels(row)} for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(setting.folder),
            callbacks=[TakesTurns()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class Contestant(NamedTuple):
    run: Callable[[Setting, Turns], None]
    needs: tuple[str, ...] = ()  # packages
    on: tuple[str, ...] = ("cpu", "cuda")

    def can_run(self, device: str) -> bool:
        return device in self.on and all(find_spec(name) for name in self.needs)


CONTESTANTS = {
    "PEFT": Contestant(peft, ("peft",)),
    "TRL": Contestant(trl, ("peft", "trl")),
    "PEFT + Liger": Contestant(peft_with_liger, ("peft", "liger_kernel"), on=("cuda",)),
    "Unsloth": Contestant(unsloth, ("unsloth",), on=("cuda",)),
    "lora, padded": Contestant(lora_padded),
    "lora, by length": Contestant(lora_by_length),
    "lora": Contestant(lora_packed),
    "full": Contestant(full),
}


def work(name: str, setting: Setting, pipe: Connection, threads: int) -> None:
    """The whole life of a contestant's process; the pipe ends with it."""
    torch.set_num_threads(threads)
    quiet_transformers()
    warnings.simplefilter("ignore")  # what others deprecate is not ours to mend
    try:
        CONTESTANTS[name].run(setting, Turns(pipe, setting.device))
    except torch.OutOfMemoryError:
        pipe.send("out of memory")
    except EOFError:
        pass  # no more turns
    finally:
        pipe.close()


def padded(rows: Sequence[Example], size: int) -> list[Batch]:
    """What most training loops do: rows as they come, each batch padded to its longest."""
    return [collate([[row] for row in rows[i : i + size]]) for i in range(0, len(rows), size)]


def _packed(rows: Sequence[Example], setting: Setting) -> list[Batch]:
    return _laid_out(rows, Layout(setting.tokens // setting.packed, setting.packed))


def _laid_out(rows: Sequence[Example], layout: Layout) -> list[Batch]:
    return [batch for _, batch in micro_batches(list(rows), layout, rank=0, processes=1)]


def _lora(setting: Setting, turns: Turns, batches: Callable[[Sequence[Example]], list[Batch]]) -> None:
    model = load_model(Base("base", setting.folder), dtype=setting.dtype, device=setting.device)
    paths = choose_targets(ALL_LINEAR, list(weights_of(model)), head=by_name_alone(model))
    inject(model, LoRAConfig(r=R, lora_alpha=R, target_modules=()), paths, seed=SEED)
    _ours(model, setting, turns, batches)


def _ours(
    model: nn.Module, setting: Setting, turns: Turns, batches: Callable[[Sequence[Example]], list[Batch]]
) -> None:
    """The parts that `lora train` makes its steps of."""
    if setting.checkpointing:
        checkpoint_activations(model, EVERY_BLOCK)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(Training(learning_rate=RATE), parameters)
    accelerator = make_accelerator()
    learn = Learning(Task(model, sft).train(), accelerator)
    for rows in setting.steps:
        turns.begin()
        items = sum(row.items for row in rows)
        losses = [learn(batch, items, SEED).total for batch in batches(rows)]
        accelerator.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.end(torch.stack(losses).sum().item() / items)


def _loop(model: nn.Module, setting: Setting, turns: Turns) -> None:
    _start_alike(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    model.train()
    for rows in setting.steps:
        turns.begin()
        items, losses = sum(row.items for row in rows), []
        for start in range(0, len(rows), setting.size):
            batch = _as_transformers_has_it(rows[start : start + setting.size], setting.device)
            loss = model(**batch, num_items_in_batch=items).loss
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.end(torch.stack(losses).sum().item())


def _as_transformers_has_it(rows: Sequence[Example], device: str) -> dict[str, Tensor]:
    longest = max(len(row.input_ids) for row in rows)
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    labels = torch.full_like(ids, IGNORE)
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        ids[place, :length], mask[place, :length] = torch.tensor(row.input_ids), 1
        labels[place, :length] = torch.tensor(_labels(row))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _labels(row: Example) -> list[int]:
    return [token if weight else IGNORE for token, weight in zip(row.input_ids, row.weights, strict=True)]


def _plain_base(setting: Setting) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=setting.dtype, local_files_only=True)
    model.to(setting.device).config.use_cache = False
    if setting.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def _start_alike(model: nn.Module) -> None:
    """PEFT's A with the values that ours draws for the same module, so that all steps can be compared."""
    for name, parameter in model.named_parameters():
        path, found, _ = name.partition(".lora_A.")
        if found:
            A = torch.empty(parameter.shape)
            generator = generator_for(SEED, path.removeprefix("base_model.model."))
            parameter.data.copy_(nn.init.kaiming_uniform_(A, a=sqrt(5), generator=generator))


def _forget_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(device: str) -> int:
    """Of the process on a CPU, all it holds; of the allocator on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
