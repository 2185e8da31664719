"""One side of bench_before.py: LoRA steps by whichever `lora_cli` is on PYTHONPATH, told what to do line by line on stdin.

    {"folder": …, "targets": …, …}    loads a case            -> {"parameters": trained ones}
    "step"                            one optimizer step      -> {"seconds": processor time, "loss": …}
    "memory"                          one more, measured      -> {"bytes": of live tensors, at the peak}

It uses what older code has too, and nothing else of `lora_cli`.
"""

import gc
import json
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_cli.data.collate import collate
from lora_cli.data.types import Example, RowId
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.inject import inject
from lora_cli.lora.targets import choose_targets
from lora_cli.lora.weights import weights_of
from lora_cli.models.base import Base
from lora_cli.models.heads import Head, new_modules
from lora_cli.models.load import by_name_alone, load_model
from lora_cli.objectives.table import OBJECTIVES
from lora_cli.train.meter import measured
from lora_cli.train.task import Task

R, RATE, LABELS = 16, 1e-3, ("a", "b", "c")


class Side:
    """A model, its optimizer and its rows."""

    def __init__(
        self,
        folder: str,
        targets: Any,
        vocabulary: int,
        rows: int,
        length: int,
        classify: bool,
        quantize: str,
        **config,
    ) -> None:
        torch.manual_seed(0)
        head = Head(LABELS, pad_token_id=0) if classify else None
        self.model = load_model(Base("base", Path(folder)), dtype=torch.float32, quantize=quantize, head=head)
        whole = list(new_modules(self.model)) if head else []
        paths = choose_targets(targets, list(weights_of(self.model)), head=by_name_alone(self.model))
        inject(self.model, LoRAConfig(r=R, lora_alpha=R, target_modules=(), **config), paths, whole=whole)
        self.task = Task(self.model, OBJECTIVES["classify" if classify else "sft"]).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, fused=True)
        draw = random.Random(0)
        made = [_example(draw, vocabulary, length if classify else length // 2) for _ in range(2 * rows)]
        labelled = [[replace(made[i], label=i % len(LABELS))] for i in range(rows)]
        self.batch = collate(labelled if classify else [made[i : i + 2] for i in range(0, 2 * rows, 2)])

    def step(self) -> float:
        loss = self.task(self.batch).total / self.batch["weights"].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def timed(self) -> dict[str, float]:
        began = time.process_time()
        loss = self.step()
        return {"seconds": time.process_time() - began, "loss": loss}

    def memory(self) -> dict[str, int]:
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        with measured(torch.device("cpu"), [*self.model.parameters(), *self.model.buffers(), *state]) as peak:
            self.step()
        return {"bytes": peak.bytes}


def _example(draw: random.Random, vocabulary: int, length: int) -> Example:
    """Of which the last two thirds are trained."""
    read = length // 3
    ids = [draw.randrange(5, vocabulary) for _ in range(length)]
    return Example(ids, [0.0] * read + [1.0] * (length - read), RowId("random", 0))


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    answers, side = sys.stdout, None
    for line in sys.stdin:
        asked = json.loads(line)
        with redirect_stdout(sys.stderr):
            try:
                if isinstance(asked, dict):
                    side = None  # its memory is the next one's
                    gc.collect()
                    side = Side(**asked)
                    found: dict[str, Any] = {"parameters": sum(p.numel() for p in side.parameters)}
                else:
                    act: Callable[[], dict] = {"step": side.timed, "memory": side.memory}[asked]
                    found = act()
            except Exception as error:  # older code may not know the case
                found = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
