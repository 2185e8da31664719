"""A small model with an adapter that is trained step by step, and saved."""

from layers import PATH, config_of, frozen, inputs

from lora_cli.lora.adapter import Adapter
from lora_cli.lora.init import INITS
from lora_cli.lora.inject import inject
from lora_cli.recipe.schema import Training
from lora_cli.train.checkpoint import save_checkpoint
from lora_cli.train.optim import make_optimizer, optimizer_state
from lora_cli.train.progress import Progress

SETTINGS = {"lora.r": 4, "training.learning_rate": 1e-2}


class Run:
    """A model with an adapter and its optimizer, trained step by step."""

    def __init__(self, variant: str = "plain", init: str = "default") -> None:
        self.config = config_of(variant)
        self.model = frozen("Linear")
        inject(self.model, self.config, [PATH], init=INITS[init])
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(Training(learning_rate=1e-2), self.parameters)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            x = inputs() * self.step
            self.model(x).pow(2).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder, *, keep: int = 9):
        return save_checkpoint(
            folder,
            Progress(self.step, 10 * self.step, 1.5, 0.25, 1),
            Adapter.of(self.model, self.config),
            optimizer_state(self.optimizer, self.parameters),
            settings=SETTINGS,
            transposed=False,
            keep=keep,
        )
