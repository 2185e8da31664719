"""The sentence of each mistake: one test a message, with its exact text and place."""

from pathlib import Path

import pytest

from lora_cli.errors import Problem, RecipeError
from lora_cli.recipe.other_tools import OTHER_TOOLS, foreign_names
from lora_cli.recipe.reader import read_recipe, value_of
from lora_cli.recipe.schema import blocks, keys
from lora_cli.recipe.spelling import spelled

LEAST = {"model": ["base: m"], "lora": ["alpha: 5"], "data": ["train: d"], "training": ["epochs: 1"]}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def problems(text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    Path("r.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        read_recipe("r.yaml", overrides)
    return [str(problem) for problem in raised.value.problems]


def with_line(block: str, line: str) -> str:
    """The least recipe with one more line as the first of `block`, which is then line 2 + 2 × its number."""
    lines = {name: [line, *inner] if name == block else inner for name, inner in LEAST.items()}
    text = "".join(f"{name}:\n" + "".join(f"  {inner}\n" for inner in lines[name]) for name in lines)
    return text if block else f"{line}\n{text}"


ROW = {"": 1, "model": 2, "lora": 4, "data": 6, "training": 8}


@pytest.mark.parametrize(
    ("block", "line", "column", "what", "fix"),
    [
        # the wrong kind of value
        ("lora", "r: abc", 6, "`lora.r` must be a whole number, not `abc`", "for example `r: 8`, the default"),
        ("lora", "r: 1.5", 6, "`lora.r` must be a whole number, not `1.5`", "for example `r: 8`, the default"),
        ("lora", "r: [8]", 6, "`lora.r` must be a whole number, not a list", "for example `r: 8`, the default"),
        ("lora", "r:", 5, "`lora.r` must be a whole number, not `null`", "leave the line out for the default, `r: 8`"),
        ("lora", "dropout: some", 12, "`lora.dropout` must be a number, not `some`",
         "for example `dropout: 0.0`, the default"),
        ("lora", "dropout: nan", 12, "`lora.dropout` must be a finite number, not `nan`",
         "for example `dropout: 0.0`, the default"),
        ("lora", "use_dora: ja", 13, "`lora.use_dora` must be `true` or `false`, not `ja`",
         "for example `use_dora: false`, the default"),
        ("lora", "exclude: lm_head", 12, "`lora.exclude` must be a list, not `lm_head`", "write `exclude: [lm_head]`"),
        ("lora", "layers: [0, x]", 15, "`lora.layers[1]` must be a whole number, not `x`",
         "for example `layers: [0, 1, 2]`"),
        ("lora", "targets: [[q]]", 13, "`lora.targets[0]` must be text, not a list",
         "for example `targets: all-linear`, the default"),
        ("lora", "targets: {q: v}", 12, "`lora.targets` must be text or a list, not a block of keys",
         "for example `targets: all-linear`, the default"),
        ("lora", "targets: []", 12, "`lora.targets` is empty", "for example `targets: all-linear`, the default"),
        ("lora", "rank_pattern: 4", 17, "`lora.rank_pattern` must be a block of `name: value`, not `4`",
         "for example `rank_pattern: {q_proj: 16}`"),
        ("lora", "rank_pattern: {q_proj: x}", 26, "`lora.rank_pattern.q_proj` must be a whole number, not `x`",
         "for example `rank_pattern: {q_proj: 16}`"),
        ("model", "revision: ''", 13, "`model.revision` is empty", "for example `revision: main`"),
        ("training", "micro_batch_size: some", 21,
         "`training.micro_batch_size` must be `auto` or a whole number, not `some`",
         "for example `micro_batch_size: auto`, the default"),
        ("training", "gradient_checkpointing: some", 27,
         "`training.gradient_checkpointing` must be one of `auto`, `mlp` or `true` or `false` or a whole number, not `some`",
         "for example `gradient_checkpointing: auto`, the default"),
        ("training", "max_time: 1:30", 13,
         "`training.max_time` must be a time such as `2h`, `90m` or `45s`, not `1:30`", "for example `max_time: 2h`"),
        # outside its limits
        ("lora", "r: 0", 6, "`lora.r` must be at least 1, not `0`", "for example `r: 8`, the default"),
        ("lora", "dropout: 1", 12, "`lora.dropout` must be below 1, not `1`",
         "for example `dropout: 0.0`, the default"),
        ("training", "learning_rate: 0", 18, "`training.learning_rate` must be above 0, not `0`",
         "for example `learning_rate: 0.0002`, the default"),
        ("training", "warmup_ratio: 3", 17, "`training.warmup_ratio` must be at most 1, not `3`",
         "for example `warmup_ratio: 0.03`, the default"),
        ("training", "micro_batch_size: 0", 21, "`training.micro_batch_size` must be `auto` or at least 1, not `0`",
         "for example `micro_batch_size: auto`, the default"),
        ("training", "keep_checkpoints: 1", 21, "`training.keep_checkpoints` must be at least 2, not `1`",
         "for example `keep_checkpoints: 2`, the default"),
        # none of the choices
        ("model", "quantize: nf44", 13, "`model.quantize` must be one of `none`, `int8`, `nf4`, not `nf44`",
         "write `quantize: nf4`"),
        ("model", "dtype: fp16", 10,
         "`model.dtype` must be one of `auto`, `float32`, `bfloat16`, `float16`, not `fp16`", "write `dtype: float16`"),
        ("model", "quantize: 2", 13, "`model.quantize` must be one of `none`, `int8`, `nf4`, not `2`",
         "for example `quantize: none`, the default"),
        ("training", "objective: dpo", 14, "`training.objective` must be one of `sft`, `classify`, not `dpo`",
         "for example `objective: sft`, the default"),
        ("training", "trackers: [wandbb]", 14,
         "`training.trackers[0]` must be one of `tensorboard`, `wandb`, `mlflow`, `trackio`, not `wandbb`",
         "write `trackers: [wandb]`"),
        ("training", "trackers: wandb", 13, "`training.trackers` must be a list, not `wandb`",
         "write `trackers: [wandb]`"),
        ("data", "train_on: answer", 13, "`data.train_on` must be one of `answers`, `last`, `all`, not `answer`",
         "write `train_on: answers`"),
        ("data", "bad_rows: ignore", 13, "`data.bad_rows` must be one of `error`, `skip`, not `ignore`",
         "for example `bad_rows: error`, the default"),
        ("data", "columns: question", 12, "`data.columns` must be a block of `name: value`, not `question`",
         "for example `columns: {prompt: question, completion: answer}`"),
        # templates
        ("data", "template: 'a {b}'", 13,
         "`data.template` must be text with `[[…]]` around what is trained, such as `[[{b}]]`, not `a {b}`",
         "for example `template: Q {question} A [[{answer}]]`"),
        ("data", "template: '[[a {b]]'", 13, "`data.template` must be text whose fields are written `{name}`, and "
         "whose other braces are doubled, not `[[a {b]]`", "for example `template: Q {question} A [[{answer}]]`"),
        ("data", "template: '[[{a}'", 13,
         "`data.template` must be text in which each `[[` is closed by a `]]`, not `[[{a}`",
         "for example `template: Q {question} A [[{answer}]]`"),
        ("data", "template: '[[{a}]] b'", 13, "`data.template` must be text that ends with what is trained, for the "
         "end token is put behind it, not `[[{a}]] b`", "for example `template: Q {question} A [[{answer}]]`"),
        # unknown keys
        ("lora", "dropuot: 0", 3, "`lora.dropuot` is not a recipe key", "rename it to `lora.dropout`"),
        ("lora", "Use_DoRA: 0", 3, "`lora.Use_DoRA` is not a recipe key", "rename it to `lora.use_dora`"),
        ("lora", "learning_rat: 1", 3, "`lora.learning_rat` is not a recipe key",
         "write `learning_rate: 1` under `training:`"),
        ("lora", "rnak: 8", 3, "`lora.rnak` is not a recipe key; torchtune's `rank` is `lora.r` here",
         "rename it to `lora.r`"),
        ("training", "warmup_stpes: 9", 3, "`training.warmup_stpes` is not a recipe key; Transformers' `warmup_steps` is "
         "`training.warmup_ratio` here", "for example `warmup_ratio: 0.03` under `training:`"),
        ("", "lora_rnk: 8", 1, "`lora_rnk` is not a recipe key; LLaMA-Factory's `lora_rank` is `lora.r` here",
         "write `r: 8` under `lora:`"),
        ("data", "zzz: 1", 3, "`data.zzz` is not a recipe key",
         "the keys of `data` are train, eval, format, columns, template, train_on, bad_rows, max_length, packing"),
        ("", "zzz: 1", 1, "`zzz` is not a recipe key",
         "the blocks of a recipe are `model`, `lora`, `data`, `training`, and `output` beside them"),
        ("", "outptu: x/", 1, "`outptu` is not a recipe key", "rename it to `output`"),
        ("", "trainig: {epochs: 1}", 1, "`trainig` is not a recipe key", "rename it to `training`"),
        ("", "train: {epochs: 1}", 1, "`train` is not a recipe key", "rename it to `training`"),
        ("", "r: 4", 1, "`r` belongs under `lora`", "write `r: 4` under `lora:`"),
        ("lora", "micro_batch_size: 4", 3, "`micro_batch_size` belongs under `training`",
         "write `micro_batch_size: 4` under `training:`"),
        ("model", "output: x/", 3, "`output` belongs at the top level", "write `output: x/` at the top level"),
        ("", "lora.r: 4", 1, "`lora.r` is written with a dot", "write `r: 4` under `lora:`"),
        ("", "[a]: 4", 1, "a key must be a word, not a list or a block", "write `key: value`"),
        # other tools' names
        ("data", "cutoff_len: 512", 3, "`cutoff_len` is LLaMA-Factory's name; here it is `data.max_length`",
         "rename it to `data.max_length`"),
        ("", "sequence_len: 512", 1, "`sequence_len` is axolotl's name; here it is `data.max_length`",
         "write `max_length: 512` under `data:`"),
        ("", "output-dir: x/", 1, "`output-dir` is Transformers' name; here it is `output`", "rename it to `output`"),
        ("", "load_in_4bit: true", 1, "`load_in_4bit` is Transformers' name; here it is `model.quantize: nf4`",
         "write `quantize: nf4` under `model:`"),
        ("", "load_in_4bit: false", 1, "`load_in_4bit` is Transformers' name; here it is `model.quantize: nf4`",
         "remove it; off is the default"),
        ("", "val_set_size: 0.05", 1, "`val_set_size` is axolotl's name; here it is `data.eval`",
         "for example `eval: 5%` under `data:`"),
        ("", "use_gradient_checkpointing: unsloth", 1,
         "`use_gradient_checkpointing` is Unsloth's name; here it is `training.gradient_checkpointing`",
         "for example `gradient_checkpointing: auto` under `training:`"),
        ("training", "gradient_accumulation_steps: 4", 3, "`gradient_accumulation_steps` is Transformers' name; "
         "here it is derived from `training.global_batch_size`",
         "remove it; `training.global_batch_size` = micro_batch_size × accumulation × devices"),
        # rules between keys
        ("data", "eval: 100%", 3, "`data.eval: 100%` leaves no rows to train on",
         "set a share above 0 % and below 100 %, such as `data.eval: 5%`"),
        ("data", "eval: 0%", 3, "`data.eval: 0%` leaves no rows to evaluate",
         "set a share above 0 % and below 100 %, such as `data.eval: 5%`"),
        ("data", "eval: 0.05", 3, "`data.eval: 0.05` is a number without `%`",
         "write a share such as `data.eval: 5%`"),
        ("training", "micro_batch_size: 32", 3,
         "`training.micro_batch_size: 32` is larger than `training.global_batch_size: 16`",
         "set `training.micro_batch_size: 16` or less, or `auto`"),
        ("training", "early_stopping_patience: 3", 3,
         "`training.early_stopping_patience` needs `data.eval` and `training.eval_steps`: it counts evaluations",
         "set `data.eval: 5%` and `training.eval_steps: 100`, or leave the patience out"),
        ("training", "eval_steps: 10", 3, "`training.eval_steps` needs `data.eval`: there is nothing to evaluate",
         "set `data.eval: 5%`"),
        ("lora", "targets: '*_proj'", 3,
         "`*_proj` in `lora.targets` is not a valid pattern: nothing to repeat at position 0",
         "use a name, or a regular expression such as `.*_proj`"),
        ("lora", "rank_pattern: {'(q': 4}", 3,
         "`(q` in `lora.rank_pattern` is not a valid pattern: missing ), unterminated subpattern at position 0",
         "use a name, or a regular expression such as `.*_proj`"),
    ],
)  # fmt: skip
def test_one_mistake_is_told_with_its_place_its_line_and_its_fix(block, line, column, what, fix):
    expected = f"error: {what}\n  --> r.yaml:{ROW[block]}:{column}\n     | {line}\n  fix: {fix}"

    assert problems(with_line(block, line)) == [expected]


# A line in the place of `train: d`, which is line 6
SOURCES = [
    ("train: {source: b}", 10, "`data.train` must be a list, not a block of keys", "write `train: [{source: b}]`"),
    ("train: null", 10, "`data.train` must be text, not `null`", "for example `train: train.jsonl`"),
    ("train: [a, '']", 14, "`data.train[1]` is empty", "for example `train: train.jsonl`"),
    ("train: [[a]]", 11, "`data.train[0]` must be text, not a list", "for example `train: train.jsonl`"),
    ("train: [{weight: 1}]", 11, "`data.train[0].source` is needed",
     "add `source`, as in `{source: train.jsonl}`"),
    ("train: [{sorce: b}]", 12, "`data.train[0].sorce` is not a key of a source", "rename it to `source`"),
    ("train: [{path: b}]", 12, "`data.train[0].path` is not a key of a source", "rename it to `source`"),
    ("train: [{source: b, zzz: 1}]", 23, "`data.train[0].zzz` is not a key of a source",
     "the keys of a source are source, weight, share, split, config, revision, format, columns"),
    ("train: [{source: a, weight: x}]", 31, "`data.train[0].weight` must be a number, not `x`",
     "for example `weight: 2.0`"),
    ("train: [{source: a, weight: 0}]", 31, "`data.train[0].weight` must be above 0, not `0`",
     "for example `weight: 2.0`"),
    ("train: [{source: a, share: 2}]", 30, "`data.train[0].share` must be at most 1, not `2`",
     "for example `share: 0.3`"),
    ("train: [{source: a, split:}]", 29, "`data.train[0].split` must be text, not `null`", "leave `split` out"),
    ("train: [{source: a, columns: x}]", 32, "`data.train[0].columns` must be a block of `name: value`, not `x`",
     "for example `columns: {prompt: question}`"),
    ("train: [{source: a, share: 0.3}, b]", 3, "`data.train` mixes by `share`, and `b` has none",
     "give every source a `share`, or use `weight`"),
    ("train: [{source: a, share: 0.5}, {source: b, share: 0.5, weight: 2}]", 3,
     "`data.train` mixes by `weight` and by `share`: `b` has a weight", "give every source a `share`, or none"),
    ("train: [{source: a, share: 0.3}, {source: b, share: 0.3}]", 3,
     "the shares of `data.train` sum to 0.6, not to 1",
     "in the same proportion they are 0.5, 0.5; or use `weight`, which need not sum to anything"),
    ("train: [{source: a, weight: 2}, a]", 3, "`data.train` mixes `a` in twice",
     "name it once, with a `weight` for both"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "column", "what", "fix"), SOURCES)
def test_a_mistake_in_a_source_is_told_with_its_place_its_line_and_its_fix(line, column, what, fix):
    text = with_line("data", line).replace("  train: d\n", "")

    assert problems(text) == [f"error: {what}\n  --> r.yaml:6:{column}\n     | {line}\n  fix: {fix}"]


def test_a_template_and_a_format_both_say_how_a_row_is_read():
    text = with_line("data", "template: '[[{a}]]'").replace("  train: d\n", "  train: d\n  format: text\n")

    assert problems(text) == [
        "error: `data.template` and `data.format: text` both say how a row is read\n  --> r.yaml:6:3\n"
        "     | template: '[[{a}]]'\n"
        "  fix: leave one of them out; a source in `data.train` may have a `format` of its own"
    ]


def test_a_frozen_A_leaves_no_ratio_of_rates():
    text = with_line("training", "loraplus_lr_ratio: 16").replace("  alpha: 5\n", "  freeze_A: true\n")

    assert problems(text) == [
        "error: `training.loraplus_lr_ratio: 16` sets B's rate beside A's, and `lora.freeze_A` trains no A\n"
        "  --> r.yaml:8:3\n     | loraplus_lr_ratio: 16\n"
        "  fix: set `training.learning_rate: 0.0032` and leave it out"
    ]


def test_loftq_needs_a_quantised_base():
    assert problems(with_line("lora", "init: loftq")) == [
        "error: `lora.init: loftq` makes good what quantising takes from the base, and `model.quantize` is `none`\n"
        "  --> r.yaml:4:3\n     | init: loftq\n  fix: set `model.quantize: nf4`, or leave `init` out"
    ]


def test_eva_leaves_no_rank_to_patterns():
    assert problems(with_line("lora", "init: eva") + "  seed: 1\n", ("lora.rank_pattern={q_proj: 4}",)) == [
        "error: `lora.init: eva` chooses the rank of each module, and `lora.rank_pattern` or `lora.alpha_pattern` sets "
        "it too\n  --> r.yaml:4:3\n     | init: eva\n  fix: leave the patterns out, or use another `init`"
    ]


def test_sample_prompts_give_every_field_of_a_template():
    text = with_line("data", "template: '{a} {b} [[{c}]]'") + "  sample_prompts: [why]\n"

    assert problems(text) == [
        "error: `data.template` asks with 2 fields, and this prompt does not give them: `why` in "
        "`training.sample_prompts`\n  --> r.yaml:10:3\n     | sample_prompts: [why]\n"
        '  fix: give a text for each field, as JSON: {"a": "…", "b": "…"}'
    ]


def test_a_key_given_twice_names_the_line_of_the_first():
    assert problems(with_line("lora", "alpha: 4")) == [
        "error: `lora.alpha` is given twice\n  --> r.yaml:5:3\n     | alpha: 5\n"
        "  fix: keep one of the two; the first is in line 4"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {train: d}\n",
         ["error: `model.base` is needed\n  --> r.yaml:1:1\n"
          "  fix: add `model: {base: HuggingFaceTB/SmolLM2-135M-Instruct}`"]),
        ("# why\nmodel: {base: m}\ndata:\n  eval: 5%\n",
         ["error: `data.train` is needed\n  --> r.yaml:3:1\n     | data:\n"
          "  fix: add `train: train.jsonl` under `data:`"]),
        ("model:\ndata: {}\n",
         ["error: `model.base` is needed\n  --> r.yaml:1:1\n     | model:\n"
          "  fix: add `base: HuggingFaceTB/SmolLM2-135M-Instruct` under `model:`",
          "error: `data.train` is needed\n  --> r.yaml:2:1\n     | data: {}\n"
          "  fix: add `train: train.jsonl` under `data:`"]),
        ("model: m\ndata: {train: d}\n",
         ["error: `model` must be a block of keys, not `m`\n  --> r.yaml:1:8\n     | model: m\n"
          "  fix: write `model: {base: m}`"]),
        ("model: {base: m}\ndata: {train: d}\nlora: 8\n",
         ["error: `lora` must be a block of keys, not `8`\n  --> r.yaml:3:7\n     | lora: 8\n"
          "  fix: put its keys on lines of their own under `lora:`"]),
        ("model: {base_model: m}\ndata: {train: d}\n",
         ["error: `base_model` is axolotl's name; here it is `model.base`\n  --> r.yaml:1:9\n"
          "     | model: {base_model: m}\n  fix: rename it to `model.base`"]),
    ],
    ids=["no block", "no key", "empty blocks", "model as text", "lora as a number", "named as elsewhere"],
)  # fmt: skip
def test_what_is_needed_is_missed_once_and_where_it_belongs(text, expected):
    assert problems(text) == expected


MANY = """\
model:
  base: m
  dtype: bf16
lora:
  r: 0
  rank: 16
  r: 3
data:
  cutoff_len: 1024
  packing: true
training:
  learning_rate: fast
  max_length: 5
"""


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file():
    told = problems(MANY, ("lora.alpha=x",))

    assert [tuple(problem.splitlines()[:2]) for problem in told] == [
        (
            "error: `model.dtype` must be one of `auto`, `float32`, `bfloat16`, `float16`, not `bf16`",
            "  --> r.yaml:3:10",
        ),
        ("error: `lora.r` must be at least 1, not `0`", "  --> r.yaml:5:6"),
        ("error: `rank` is torchtune's name; here it is `lora.r`", "  --> r.yaml:6:3"),
        ("error: `lora.r` is given twice", "  --> r.yaml:7:3"),
        ("error: `data.train` is needed", "  --> r.yaml:8:1"),
        ("error: `cutoff_len` is LLaMA-Factory's name; here it is `data.max_length`", "  --> r.yaml:9:3"),
        ("error: `training.learning_rate` must be a number, not `fast`", "  --> r.yaml:12:18"),
        ("error: `max_length` belongs under `data`", "  --> r.yaml:13:3"),
        ("error: `lora.alpha` must be a number, not `x`", "  --> --set lora.alpha=x"),
    ]


def test_a_rule_is_silent_about_keys_that_have_no_usable_value():
    text = with_line("training", "early_stopping_patience: 3").replace("epochs: 1", "eval_steps: many")

    assert len(problems(text)) == 1


ODD = ["null", "''", "x", "[]", "{}", "[x]", "[[]]", "[null]", "{a: b}", "{a: null}", "-1", "0", "1e999", "9" * 5000]


@pytest.mark.parametrize("key", keys())
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:9])
def test_whatever_stands_in_a_key_is_read_or_refused_in_a_sentence_with_place_and_fix(key, odd):
    block, _, name = key.rpartition(".")
    base = "" if key == "model.base" else "  base: m\n"
    train = "" if key == "data.train" else "  train: d\n"
    inner = {"model": base, "data": train, "lora": "", "training": ""}
    inner |= {block: f"  {name}: {odd}\n{inner[block]}"} if block else {}
    text = "".join(f"{block}:\n{lines}" for block, lines in inner.items()) + ("" if block else f"{name}: {odd}\n")

    assert all(problem.what and problem.where and problem.fix for problem in told_about(text))


def told_about(text: str) -> tuple[Problem, ...]:
    """The problems of a recipe, or none; anything but a RecipeError goes through."""
    Path("r.yaml").write_text(text)
    try:
        read_recipe("r.yaml")
    except RecipeError as error:
        return error.problems
    return ()


# --- other tools' names


def test_every_name_of_another_tool_means_a_key_here_and_is_none_itself():
    ours = {key.rpartition(".")[2] for key in keys()} | set(blocks())

    assert {other.key for other in foreign_names().values()} <= set(keys())
    assert not set(foreign_names()) & ours
    assert len(foreign_names()) >= 60


def test_no_name_belongs_to_two_tools():
    names = [name for table in OTHER_TOOLS.values() for name in table]

    assert len(names) == len(set(names))


@pytest.mark.parametrize("other", [other for other in foreign_names().values() if other.value], ids=str)
def test_a_value_that_a_name_implies_is_a_value_of_our_key(other):
    Path("r.yaml").write_text("model: {base: m}\ndata: {train: d}\n")

    recipe = read_recipe("r.yaml", [f"{other.key}={other.value}"]).recipe

    assert spelled(value_of(recipe, other.key)) == other.value
