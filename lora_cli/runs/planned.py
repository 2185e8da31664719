"""How many steps a recipe will take, and which labels it will learn, from the rows of its files without rendering them."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_cli.data.formats import labelled, labels_in
from lora_cli.data.order import plan
from lora_cli.data.sources import is_path, rows
from lora_cli.data.types import BadRow, Labelled
from lora_cli.errors import Problem
from lora_cli.recipe.reader import LoadedRecipe
from lora_cli.recipe.schema import NO_LABELS, Source, labels_of, share_of, sources_of


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


@dataclass(frozen=True)
class LabelsToLearn:
    """The labels of a classifier's head; the note says why they are not those of the rows."""

    names: tuple[str, ...]
    note: str = ""


def labels_to_learn(loaded: LoadedRecipe) -> LabelsToLearn | None:
    """None where nothing is classified. Rows on the hub are not fetched, and held-out ones count with the others."""
    data, folder = loaded.recipe.data, loaded.path.parent
    named = labels_of(loaded.recipe.training)
    if named is None or named:
        return LabelsToLearn(named) if named else None
    found = [_labelled(source, folder, data.columns) for source in sources_of(data.train) if is_path(source, folder)]
    if names := labels_in([item for items in found for item in items]):
        return LabelsToLearn(tuple(names))
    return LabelsToLearn(NO_LABELS, f"the labels are not known before the rows are here: {len(NO_LABELS)} are counted")


def _labelled(source: Source, folder: Path, columns: Mapping[str, str]) -> list[Labelled]:
    """The rows that have a text and a label."""
    named, found = columns if source.columns is None else source.columns, []
    for _, row in rows(source, folder=folder):
        with suppress(BadRow):
            if not isinstance(row, Problem):
                found.append(labelled(row | {ours: row[theirs] for ours, theirs in named.items() if theirs in row}))
    return found
