"""`lora train --dry-run`: the resolved recipe with origins, the parameter budget, the planned steps. No weights."""

from lora_cli.recipe.reader import LoadedRecipe


def show_dry_run(loaded: LoadedRecipe) -> None:
    from lora_cli.budget.bases import measure_base
    from lora_cli.budget.params import adapted_linears, budget_of, full_budget
    from lora_cli.cli.console import bytes_text, show
    from lora_cli.recipe.reader import resolved_yaml
    from lora_cli.runs.planned import labels_to_learn

    show(resolved_yaml(loaded).rstrip())
    recipe = loaded.recipe
    lora, labels = recipe.lora, labels_to_learn(loaded)
    base = measure_base(
        recipe.model.base,
        recipe.model.revision,
        labels=labels.names if labels else (),
        modules_to_save=lora.modules_to_save,
        targets=lora.targets,
        bias=lora.bias,
        tokens=lora.tokens_with_rows,
    )
    show("")
    if recipe.training.full:
        budget = full_budget(base.shape.parameters)
        show(f"trains {budget} parameters, every weight of the base; the model has {bytes_text(budget.adapter_bytes)}")
        show(_steps(loaded))
        return
    paths = [module.module for module in base.whole]
    adapted = adapted_linears(base.shape, lora.targets, exclude=lora.exclude, layers=lora.layers, whole=paths)
    config = lora.config()
    budget = budget_of(adapted, base.shape.parameters, config, base.whole, biases=base.biases)
    show(
        f"trains {budget} parameters in {len(adapted) + len(paths)} modules, "
        f"scale {config.scale:g}; the adapter's file has {bytes_text(budget.adapter_bytes)}"
    )
    show(_steps(loaded))


def _steps(loaded: LoadedRecipe) -> str:
    from lora_cli.runs.planned import planned_steps

    planned = planned_steps(loaded)
    training = loaded.recipe.training
    if planned is None:
        return f"steps: known once {loaded.recipe.data.train} is downloaded ({training.global_batch_size} rows a step)"
    ends = f"max_steps {training.max_steps}" if training.max_steps else f"{training.epochs:g} epochs"
    return f"{planned.steps:,} steps of {training.global_batch_size} rows: {ends} over {planned.rows:,} rows"
