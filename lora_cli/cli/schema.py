"""`lora schema`: the recipe's JSON Schema, for editors."""


def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    Example: lora schema > recipe.schema.json
    """
    from lora_cli.cli.console import show_json
    from lora_cli.recipe.reference import recipe_schema

    show_json(recipe_schema())
