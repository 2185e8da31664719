"""`lora plan`: memory, time and cost of a recipe on a GPU or on this machine, before the run."""

from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli.options import JsonOption, RecipeArgument, SetOption

if TYPE_CHECKING:
    from lora_cli.runs.plan import Plan, Way


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help='Such as "RTX 4090" or H100; else this machine\'s device.')
    ] = None,
    gpus: Annotated[int, typer.Option(metavar="N", min=1, help="How many of them share the work.")] = 1,
    price: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Of one of them for an hour, for the cost.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Predict memory, time and cost before a run, for any GPU.

    Example: lora plan configs/llama31-8b-qlora.yaml --gpu "RTX 4090"
    """
    from lora_cli.cli.console import show_json
    from lora_cli.recipe.reader import read_recipe
    from lora_cli.runs.plan import plan as make

    made = make(read_recipe(recipe, set_ or []), gpu=gpu, gpus=gpus, price=price)
    if json:
        show_json(_document(made))
    else:
        _show(made)


def _show(plan: "Plan") -> None:
    from lora_cli.cli.console import bytes_text, inert, plain_table, show, show_table

    lora, machine = plan.ways[0].setup.config, plan.machine
    devices = f"{plan.gpus} × {machine.name}" if plan.gpus > 1 else machine.name
    show(f"{inert(plan.base.name)} · r {lora.r} · {devices}, {bytes_text(machine.memory)}\n", style="bold")
    table = plain_table("", *(way.name for way in plan.ways))
    for name, cells in _lines(plan):
        table.add_row(name, *cells)
    show_table(table)
    show("")
    for note in _notes(plan):
        show(note, style="dim")


def _lines(plan: "Plan") -> list[tuple[str, list[str]]]:
    from lora_cli.cli.console import bytes_text, duration
    from lora_cli.models.recompute import described

    room = bytes_text(plan.machine.place.room)
    lines = [
        ("fits", lambda way: "yes" if way.fits else "no"),
        ("a forward", lambda way: f"{way.option.batch.rows} × {way.option.batch.row_length:,}"),
        ("checkpointing", lambda way: described(way.option.recompute)),
        ("weights", lambda way: bytes_text(way.option.memory.weights)),
        ("adapter, optimizer", lambda way: bytes_text(way.option.memory.standing - way.option.memory.weights)),
        ("activations", lambda way: bytes_text(way.option.memory.activations)),
        ("logits", lambda way: bytes_text(way.option.memory.logits)),
        ("rest", lambda way: bytes_text(way.rest)),
        (f"needed of {room}", lambda way: bytes_text(way.peak)),
        ("at least", lambda way: bytes_text(way.least)),
        ("smallest GPU", lambda way: way.smallest.name if way.smallest else "several"),
    ]
    if plan.machine.timed:
        lines += [
            ("tokens/s, about", lambda way: _if(way, f"{float(f'{way.tokens_per_second:.2g}'):,.0f}")),
            (_span(plan), lambda way: _if(way, duration(way.seconds))),
        ]
    if plan.ways[0].cost is not None:
        lines.append(("cost", lambda way: _if(way, f"{way.cost:,.2f}")))
    return [(name, [cell(way) for way in plan.ways]) for name, cell in lines]


def _if(way: "Way", text: str) -> str:
    return text if way.fits else "–"


def _span(plan: "Plan") -> str:
    return f"time, {plan.tokens / 1e6:,.1f}M tokens" if plan.counted else "time, a million tokens"


def _notes(plan: "Plan") -> list[str]:
    lengths, counted = plan.lengths, plan.counted
    rows = f"rows as they are here: {lengths.mean:,.0f} tokens in the mean, {lengths.longest:,} at most, {lengths.share:.0%} trained"
    notes = [
        rows if counted else f"rows are not here: taken to be full, {lengths.longest:,} tokens, all of them trained"
    ]
    notes.append("memory by formula; time from the rates of the data sheet, an estimate: see docs/plan.md")
    if plan.machine.place.kind == "cpu":
        notes[-1] = (
            "memory by formula, of what is free now; time from this CPU's rates, tried for a moment: an estimate"
        )
    if not plan.machine.timed:
        notes[-1] = "memory by formula; the rates of this GPU are not in the catalogue, so no time is told"
    if plan.gpus > 1:
        notes.append("several GPUs: each holds the whole base; what they tell each other is not counted")
    return [*notes, *plan.base.shape.notes]


def _document(plan: "Plan") -> dict:
    from dataclasses import asdict

    from lora_cli.models.recompute import setting_of

    def way(found: "Way") -> dict:
        option = found.option
        return {
            "name": found.name,
            "fits": found.fits,
            "micro_batch_size": option.micro_batch,
            "row_length": option.row_length,
            "forward": [option.batch.rows, option.batch.row_length],
            "gradient_checkpointing": setting_of(option.recompute),
            "memory": {**asdict(option.memory), "lost": option.lost, "needed": option.needed},
            "least_needed": found.least,
            "smallest_gpu": found.smallest.name if found.smallest else None,
            "tokens_per_second": found.tokens_per_second,
            "seconds": found.seconds,
            "cost": found.cost,
        }

    machine = plan.machine
    return {
        "model": {"name": plan.base.name, "parameters": plan.base.shape.parameters},
        "device": {"name": machine.name, "memory": machine.memory, "room": machine.place.room, "count": plan.gpus},
        "rows": {**asdict(plan.lengths), "counted": plan.counted},
        "tokens": plan.tokens,
        "ways": [way(found) for found in plan.ways],
    }
