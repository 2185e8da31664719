"""How many steps a recipe will take, counted from the rows of its files without rendering them."""

from dataclasses import dataclass

from lora_cli.data.pipeline import plan
from lora_cli.data.sources import is_path, rows
from lora_cli.recipe.reader import LoadedRecipe
from lora_cli.recipe.schema import share_of, sources_of


@dataclass(frozen=True)
class PlannedSteps:
    rows: int
    steps: int


def planned_steps(loaded: LoadedRecipe) -> PlannedSteps | None:
    """None where the rows are on the hub. Rows with nothing to learn are found later, and may make it fewer."""
    data, training, folder = loaded.recipe.data, loaded.recipe.training, loaded.path.parent
    sources = sources_of(data.train)
    if not all(is_path(source, folder) for source in sources):
        return None
    counts = [sum(1 for _ in rows(source, folder=folder)) for source in sources]
    count = round(sum(n * (source.weight or 1) for n, source in zip(counts, sources, strict=True)))
    share = share_of(data.eval) if data.eval else None
    if share:
        count -= min(max(1, round(share * count)), count - 1)
    planned = plan(
        count, epochs=training.epochs, max_steps=training.max_steps, global_batch_size=training.global_batch_size
    )
    return PlannedSteps(count, planned.steps)
