"""Reading: values by their declared types, defaults from the schema, origins, overrides, and what is refused unread."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.errors import RecipeError, SafetyError
from lora_cli.recipe.reader import data_source, read_recipe, resolved_yaml, value_of
from lora_cli.recipe.schema import Data, Model, Recipe, keys

LEAST = "model:\n  base: m\ndata:\n  train: d\n"

# A recipe with every block
CONTRACT = """\
# lora train configs/llama7b-qv.yaml
model:
  base: meta-llama/Llama-2-7b-hf   # ✱ hub id or folder
  revision: null                   # branch, tag or commit; the resolved commit is always recorded
  dtype: auto                      # auto | float32 | bfloat16 | float16
  quantize: none                   # none | int8 | nf4 | fp8
  attention: auto                  # auto | eager | sdpa | flash | flex
lora:
  r: 8                             # rank
  alpha: 16                        # default 2 × r
  targets: qv                      # letters, a list of module names or patterns, or all-linear
  dropout: 0.05
data:
  train: tatsu-lab/alpaca          # ✱ a path, a hub id, or a list of sources
  eval: 5%                         # a path, a hub id, a share of train, or null
  format: auto
  max_length: 2048                 # tokens
  packing: true
training:
  objective: sft
  epochs: 3                        # or max_steps
  learning_rate: 2e-4
  lr_scheduler: cosine
  warmup_ratio: 0.03
  global_batch_size: 16
  micro_batch_size: auto           # rows a forward, a device
  weight_decay: 0.0
  max_grad_norm: 1.0
  gradient_checkpointing: auto
  seed: 42
output: out/                       # the run folder (--out overrides)
"""


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """Writes a recipe and gives its name, relative to the current folder, as a user would type it."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes, name: str = "r.yaml") -> str:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def refusal(error: type[Exception], path: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(error) as raised:
        read_recipe(path, overrides or [])
    return str(raised.value)


def test_the_recipe_of_the_contract_reads_without_problems(recipe_file):
    loaded = read_recipe(recipe_file(CONTRACT))

    assert loaded.recipe.lora.targets == "qv"
    assert loaded.recipe.lora.config().scale == 2.0
    assert loaded.recipe.training.learning_rate == 2e-4
    assert loaded.origins["lora.r"] == "r.yaml:9:6"
    assert loaded.origins["lora.use_dora"] == "default"


def test_what_a_recipe_leaves_out_stands_at_the_default_of_the_schema(recipe_file):
    loaded = read_recipe(recipe_file(LEAST))

    assert loaded.recipe == Recipe(model=Model(base="m"), data=Data(train="d"))
    assert {key for key, origin in loaded.origins.items() if origin != "default"} == {"model.base", "data.train"}
    assert set(loaded.origins) == set(keys())


@pytest.mark.parametrize(
    ("block", "line", "key", "value"),
    [
        ("training", "learning_rate: 1e-4", "training.learning_rate", 0.0001),
        ("training", "learning_rate: .5E-3", "training.learning_rate", 0.0005),
        ("training", "max_steps: 010", "training.max_steps", 10),
        ("model", "revision: 010", "model.revision", "010"),
        ("model", "revision: 1e4", "model.revision", "1e4"),
        ("model", "revision: no", "model.revision", "no"),
        ("model", "revision: 2026-01-01", "model.revision", "2026-01-01"),
        ("model", "revision: 1:30", "model.revision", "1:30"),
        ("model", "revision: 'null'", "model.revision", "null"),
        ("model", "revision: ~", "model.revision", None),
        ("model", "revision:", "model.revision", None),
        ("lora", "use_dora: yes", "lora.use_dora", True),
        ("lora", "use_dora: off", "lora.use_dora", False),
        ("lora", "layers: [0, 3]", "lora.layers", [0, 3]),
        ("lora", "targets: [q_proj, .*_proj]", "lora.targets", ["q_proj", ".*_proj"]),
        ("lora", "rank_pattern: {self_attn.q_proj: 4}", "lora.rank_pattern", {"self_attn.q_proj": 4}),
        ("training", "micro_batch_size: 4", "training.micro_batch_size", 4),
        ("training", "gradient_checkpointing: true", "training.gradient_checkpointing", True),
        ("training", "gradient_checkpointing: auto", "training.gradient_checkpointing", "auto"),
    ],
)
def test_a_scalar_is_read_by_the_type_of_its_key(recipe_file, block, line, key, value):
    text = LEAST.replace("model:\n", f"model:\n  {line}\n") if block == "model" else f"{LEAST}{block}:\n  {line}\n"

    found = value_of(read_recipe(recipe_file(text)).recipe, key)

    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("empty", ["lora:", "lora: null", "lora: {}", "lora:\n  # r: 4\n"])
def test_a_block_with_nothing_in_it_is_a_block_of_defaults(recipe_file, empty):
    assert read_recipe(recipe_file(LEAST + empty)).recipe.lora == Recipe.model_fields["lora"].default


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
    ],
    ids=["BOM", "CRLF", "CR"],
)
def test_byte_order_marks_and_line_ends_change_neither_values_nor_positions(recipe_file, change):
    good, wrong = LEAST + "lora:\n  r: 4\n", LEAST + "lora:\n  r: x\n"

    assert read_recipe(recipe_file(change(good))).origins["lora.r"] == "r.yaml:6:6"
    assert refusal(RecipeError, recipe_file(change(wrong))) == (
        "error: `lora.r` must be a whole number, not `x`\n"
        "  --> r.yaml:6:6\n     | r: x\n  fix: for example `r: 8`, the default"
    )


def test_a_byte_order_mark_is_not_quoted_with_the_first_line(recipe_file):
    assert refusal(RecipeError, recipe_file(b"\xef\xbb\xbfr: 4\n" + LEAST.encode())) == (
        "error: `r` belongs under `lora`\n  --> r.yaml:1:1\n     | r: 4\n  fix: write `r: 4` under `lora:`"
    )


# --- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lora.r=16", "lora.r", 16),
        ("lora.targets=[q_proj, v_proj]", "lora.targets", ["q_proj", "v_proj"]),
        ("lora.rank_pattern={q_proj: 4}", "lora.rank_pattern", {"q_proj": 4}),
        ("lora.rank_pattern.q_proj=4", "lora.rank_pattern", {"q_proj": 4}),
        ("training.learning_rate=1e-5", "training.learning_rate", 1e-5),
        ("data.eval=5%", "data.eval", "5%"),
        ("training.save_steps=null", "training.save_steps", None),
        ("training.save_steps=", "training.save_steps", None),
        ("model.base=a=b", "model.base", "a=b"),
        ("output=elsewhere/", "output", "elsewhere/"),
    ],
)
def test_set_adds_and_overrides_with_the_checks_of_the_file(recipe_file, override, key, value):
    loaded = read_recipe(recipe_file(LEAST), [override])

    assert value_of(loaded.recipe, key) == value
    assert loaded.origins[key] == "--set"


def test_the_last_set_wins_and_a_block_given_whole_keeps_the_keys_it_does_not_name(recipe_file):
    overrides = ["lora.r=4", "lora={r: 32, dropout: 0.1}", "lora.dropout=0.2"]

    loaded = read_recipe(recipe_file(LEAST + "lora:\n  alpha: 5\n"), overrides)

    assert (loaded.recipe.lora.r, loaded.recipe.lora.alpha, loaded.recipe.lora.dropout) == (32, 5, 0.2)
    assert loaded.origins["lora.alpha"] == "r.yaml:6:10"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r=x", "error: `lora.r` must be a whole number, not `x`\n  --> --set lora.r=x\n"
                     "  fix: for example `--set lora.r=8`, the default"),
        ("lora.r", "error: `lora.r` has no value\n  --> --set lora.r\n  fix: write `--set lora.r=VALUE`"),
        ("r=4", "error: `r` belongs under `lora`\n  --> --set r=4\n  fix: write `--set lora.r=4`"),
        ("lora.rank=4", "error: `rank` is torchtune's name; here it is `lora.r`\n  --> --set lora.rank=4\n"
                        "  fix: rename it to `lora.r`"),
        ("lora.dropuot=0", "error: `lora.dropuot` is not a recipe key\n  --> --set lora.dropuot=0\n"
                           "  fix: rename it to `lora.dropout`"),
        ("lora.r.x=1", "error: `lora.r` must be a whole number, not a block of keys\n  --> --set lora.r.x=1\n"
                       "  fix: for example `--set lora.r=8`, the default"),
        ("lora.__class__=1", "error: `lora.__class__` is not the name of a recipe key\n  --> --set lora.__class__=1\n"
                             "  fix: write `--set block.key=value`, as in `--set lora.r=16`"),
        ("lora.targets=[q", "error: not valid YAML: expected ',' or ']', but got '<stream end>'\n"
                            "  --> --set lora.targets=[q\n"
                            "  fix: close the bracket, and put commas between the entries"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_set_points_to_it(recipe_file, override, message):
    assert refusal(RecipeError, recipe_file(LEAST), [override]) == message


def test_mistakes_in_the_file_and_in_several_sets_are_told_together(recipe_file):
    told = refusal(RecipeError, recipe_file(LEAST + "lora:\n  r: x\n"), ["lora.alpha", "training.seed=-1"])

    assert [line for line in told.splitlines() if line.startswith("  -->")] == [
        "  --> r.yaml:6:6",
        "  --> --set lora.alpha",
        "  --> --set training.seed=-1",
    ]


# --- the resolved recipe


def test_the_resolved_recipe_reads_as_the_same_recipe_from_another_folder(recipe_file, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    prompts = '["a: b", "x\\ny, z", "☃ #1", "null", "1e-4", " \\t", "{", "\\u2028"]'
    text = LEAST.replace("train: d", "train: [rows.jsonl, some/dataset]\n  eval: 5%") + (
        "lora:\n  alpha: 1e-7\n  rank_pattern: {'q,{2}': 4}\n  layers: [0]\n"
    )
    loaded = read_recipe(recipe_file(text), [f"training.sample_prompts={prompts}", "model.revision='010'"])
    (tmp_path / "out").mkdir()
    again_path = tmp_path / "out" / "recipe.yaml"

    again_path.write_text(resolved_yaml(loaded))
    again = read_recipe(again_path).recipe

    assert again.data.train == [str(tmp_path / "rows.jsonl"), "some/dataset"]
    assert again.model_copy(update={"data": loaded.recipe.data}) == loaded.recipe


def test_the_resolved_recipe_gives_the_origin_of_each_value(recipe_file):
    lines = resolved_yaml(read_recipe(recipe_file(LEAST), ["lora.r=16"])).splitlines()

    assert "  base: m                                     # r.yaml:2:9" in lines
    assert "  r: 16                                       # --set" in lines
    assert "  alpha: null                                 # default" in lines
    assert sum("  # " in line for line in lines) == len(keys())


def test_a_data_file_is_found_from_the_recipe_and_everything_else_stays(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "5%").touch()

    assert data_source("rows.jsonl", tmp_path) == str(tmp_path / "rows.jsonl")
    assert data_source("tatsu-lab/alpaca", tmp_path) == "tatsu-lab/alpaca"
    assert data_source("5%", tmp_path) == "5%"
    assert data_source("x" * 5000, tmp_path) == "x" * 5000


# --- files that are no recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "error: the recipe is empty\n  --> r.yaml\n"
             "  fix: start it with `model:` and `data:`; docs/recipe.md lists every key"),
        ("# only a comment\n", "error: the recipe is empty\n  --> r.yaml\n"
                               "  fix: start it with `model:` and `data:`; docs/recipe.md lists every key"),
        ("- a\n", "error: a recipe is blocks of keys, and this is a list\n  --> r.yaml:1:1\n     | - a\n"
                  "  fix: start it with `model:` and `data:`; docs/recipe.md lists every key"),
        ("\nhello\n", "error: a recipe is blocks of keys, and this is text\n  --> r.yaml:2:1\n     | hello\n"
                      "  fix: start it with `model:` and `data:`; docs/recipe.md lists every key"),
        (b"model:\n  base: caf\xe9\n", "error: the recipe is not UTF-8 text\n  --> r.yaml:2:12\n"
                                       "  fix: save it as UTF-8"),
        ("model:\n  base: a\x07b\n", "error: the recipe holds the character U+0007, which YAML does not allow\n"
                                     "  --> r.yaml:2:10\n     | base: a\\x07b\n  fix: remove it"),
        ("model:\n\tbase: m\n", "error: not valid YAML: found character '\\t' that cannot start any token\n"
                                "  --> r.yaml:2:1\n     | base: m\n"
                                "  fix: indent with spaces; YAML allows no tabs there"),
        ("model:\n  base: a: b\n", "error: not valid YAML: mapping values are not allowed here\n"
                                   "  --> r.yaml:2:10\n     | base: a: b\n"
                                   "  fix: indent the keys of a block alike, and quote text that holds `: `"),
        ("model:\n  base: m\n dtype: auto\n",
         "error: not valid YAML: expected <block end>, but found '<block mapping start>'\n"
         "  --> r.yaml:3:2\n     | dtype: auto\n  fix: indent the keys of a block alike"),
        ("model:\n  base: 'm\ndata:\n", "error: not valid YAML: found unexpected end of stream\n"
                                        "  --> r.yaml:2:9\n     | base: 'm\n  fix: close the quotation mark"),
        ("model:\n  base: *m\n", "error: not valid YAML: found undefined alias 'm'\n  --> r.yaml:2:9\n     | base: *m\n"
                                 "  fix: write the value out, or put text that starts with `*` in quotation marks"),
        ("model:\n  base: @m\n", "error: not valid YAML: found character '@' that cannot start any token\n"
                                 "  --> r.yaml:2:9\n     | base: @m\n  fix: put the value in quotation marks"),
        (LEAST + "---\nmodel: {}\n", "error: a recipe is one YAML document, and a second one starts here\n"
                                     "  --> r.yaml:5:1\n     | ---\n  fix: remove the `---` before it"),
    ],
)  # fmt: skip
def test_text_that_is_no_recipe_is_refused_with_its_place(recipe_file, content, message):
    assert refusal(RecipeError, recipe_file(content)) == message


def test_an_error_shows_control_characters_and_cuts_long_lines(recipe_file):
    told = refusal(RecipeError, recipe_file(LEAST + "lora:\n  r: \u202e" + "x" * 5000 + "\n", "\u202er.yaml"))

    assert "\u202e" not in told
    assert told.startswith("error: `lora.r` must be a whole number, not `\\u202exxx")
    assert "\n  --> \\u202er.yaml:6:6\n" in told
    assert len(told) < 400


def test_a_missing_recipe_names_those_that_are_there(recipe_file):
    recipe_file(LEAST, "b.yaml")
    recipe_file(LEAST, "a.yml")

    assert refusal(RecipeError, "c.yaml") == (
        "error: there is no such recipe\n  --> c.yaml\n  fix: recipes there: `a.yml`, `b.yaml`"
    )
    assert refusal(RecipeError, "no/c.yaml") == (
        "error: there is no such recipe\n  --> no/c.yaml\n  fix: no recipe is in `no`; name the path of one"
    )
    assert refusal(RecipeError, ".") == (
        "error: the recipe is a folder\n  --> .\n  fix: name one of the recipes in it: `a.yml`, `b.yaml`"
    )


def test_a_recipe_that_may_not_be_read_says_so(recipe_file, monkeypatch):
    path = recipe_file(LEAST)
    refused = PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(refused))  # root may read everything

    assert refusal(RecipeError, path) == (
        "error: the recipe cannot be read: Permission denied\n  --> r.yaml\n  fix: make it readable for you"
    )


# --- files that are refused for safety


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        (BOMB, "a recipe has at most 10,000 values, counting what aliases repeat", "r.yaml:1:"),
        ("a: [" + "x, " * 10_001 + "]", "a recipe has at most 10,000 values", "r.yaml:1:"),
        ("[" * 100_000, "a recipe nests at most 50 levels, and this goes deeper", "r.yaml:1:51"),
        ("a: &a [*a]\n", "a recipe nests at most 50 levels, and this goes deeper", "r.yaml:1:4"),
        ("model: !!python/object/apply:os.system ['true']\n", "a recipe holds plain values, and this has a YAML tag",
         "r.yaml:1:8"),
        ("model:\n  base: !include x\n", "a recipe holds plain values, and this has a YAML tag", "r.yaml:2:9"),
        ("# " + "x" * 1_000_000, "a recipe has at most 1 MB, and this file has more", "r.yaml"),
    ],
    ids=["bomb", "many", "deep", "endless", "python tag", "own tag", "large"],
)  # fmt: skip
def test_yaml_that_a_recipe_never_needs_is_refused_for_safety(recipe_file, content, what, where):
    told = refusal(SafetyError, recipe_file(content))

    assert told.startswith(f"error: {what}")
    assert f"\n  --> {where}" in told


# --- secrets


SECRETS = """\
model:
  base: m
  hf_token: hunter2
  my_secret: |
    hunter2
    hunter2
data: {train: d, api_key:
  hunter2, foo: 1}
lora:
  r: x  # password: hunter2
wandb_password: "hunter2"
"""
OVERRIDES = [
    "training.x_token=hunter2",
    "lora.r=hunter2 password=hunter2",
    "model.hub_auth=hunter2",
    "data.password.of=hunter2",
]


def test_a_secret_is_refused_and_never_echoed_nor_a_line_that_holds_one(recipe_file):
    told = refusal(RecipeError, recipe_file(SECRETS), OVERRIDES)

    assert "hunter2" not in told
    assert told.startswith(
        "error: `model.hf_token` looks like a secret, and a recipe holds none\n"
        "  --> r.yaml:3:3\n"
        "  fix: remove it; tokens come from the environment (`HF_TOKEN`) or `hf auth login`\n"
    )
    for key in ("model.my_secret", "data.api_key", "wandb_password", "training.x_token", "model.hub_auth"):
        assert f"error: `{key}` looks like a secret" in told


@pytest.mark.parametrize("line", ["hf_token: 'hunter2", "hf_token: hunter2: x", "base: hf_" + "hunter2" * 5 + ": x"])
def test_a_syntax_error_does_not_echo_a_secret(recipe_file, line):
    assert "hunter2" not in refusal(RecipeError, recipe_file(f"model:\n  {line}\n"))


def test_the_special_tokens_of_a_tokenizer_are_no_secrets(recipe_file):
    told = refusal(RecipeError, recipe_file(LEAST + "special_tokens:\n  pad_token: x\npad_token: x\n"))

    assert "looks like a secret" not in told


# --- what reading costs


@pytest.mark.parametrize("module", ["reader", "schema", "rules", "reference"])
def test_the_recipe_needs_neither_torch_nor_transformers_nor_numpy(module):
    code = f"import sys, lora_cli.recipe.{module}; print({{'torch', 'transformers', 'numpy'}} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_sources_read_as_written_and_stay_the_same_from_another_folder(tmp_path, recipe_file):
    (tmp_path / "rows.jsonl").touch()
    text = LEAST.replace(
        "train: d",
        "train: [a/b, {source: rows.jsonl, weight: 2, columns: {prompt: q}}, {source: c/d, split: 'train[:1%]'}]",
    )

    loaded = read_recipe(recipe_file(text))
    (tmp_path / "elsewhere").mkdir()
    again = read_recipe(recipe_file(resolved_yaml(loaded), "elsewhere/again.yaml")).recipe.data.train

    first, second, third = loaded.recipe.data.train
    assert (first, second.weight, second.columns, third.split) == ("a/b", 2.0, {"prompt": "q"}, "train[:1%]")
    assert again == ["a/b", second.model_copy(update={"source": str(tmp_path / "rows.jsonl")}), third]
