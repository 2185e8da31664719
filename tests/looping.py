"""The loop on a tiny model, as a generator whose state can be looked at between events."""

import torch
from tiny import tiny_model

from lora_cli.data.types import Example, RowId
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import inject
from lora_cli.objectives.sft import sft
from lora_cli.train.layout import Layout
from lora_cli.train.loop import Actions, Measured, Parts, Settings, train
from lora_cli.train.progress import Progress
from lora_cli.train.ranks import Ranks
from lora_cli.train.task import Learning, Task

TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def settings(**changed) -> Settings:
    return Settings(**{"layout": Layout(2), "seed": 1, "max_grad_norm": 1.0} | changed)


def rows(count: int = 8) -> list[Example]:
    """Rows of different lengths, of which the first tokens are a prompt."""
    return [
        Example([3 + (7 * i + j) % 300 for j in range(4 + 3 * i)], [0.0] * 2 + [1.0] * (2 + 3 * i), RowId("rows", i))
        for i in range(count)
    ]


class Run:
    def __init__(
        self,
        accelerator,
        *,
        seed: int = 0,
        losses=(),
        dropout: float = 0.0,
        rate: float = 1e-2,
        schedule=lambda step: 1.0,
        **changed,
    ):
        self.model = tiny_model("llama")
        config = LoRAConfig(r=4, lora_alpha=8, target_modules=("q_proj",), lora_dropout=dropout)
        inject(self.model, config, TARGETS, seed=seed)
        self.task = Task(self.model, sft).train()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=rate)
        self.progress = Progress()
        self.saved: list[int] = []
        self.measured = bool(losses)
        self.losses = iter(losses)
        self.settings = settings(**changed)
        self.accelerator = accelerator
        self.schedule = schedule
        self.stop = False
        self.rewind = None

    def events(self, steps: int = 6, *, sample=None):
        actions = Actions((lambda: Measured(next(self.losses), 9)) if self.measured else None, sample, self._save)
        parts = Parts(
            Learning(self.task, self.accelerator),
            self.optimizer,
            self.parameters,
            schedule=self.schedule,
            settings=self.settings,
            accelerator=self.accelerator,
            ranks=Ranks(self.accelerator, lambda: self.stop),
            rewind=self.rewind,
        )
        upcoming = [(k, rows()) for k in range(self.progress.step, steps)]
        yield from train(parts, upcoming, last_step=steps, actions=actions, progress=self.progress)

    def _save(self, progress) -> str:
        self.saved.append(progress.step)
        return "checkpoints"


def kinds(events) -> list[tuple[str, int]]:
    return [(event.name, event.step) for event in events]
