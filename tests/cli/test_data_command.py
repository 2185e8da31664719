"""`lora data`: what is shown is what is trained, token by token, and foreign text stays inert."""

import json
import os
import pty
import subprocess
import sys

import pytest

from lora_cli.data.order import steps
from lora_cli.models.load import load_tokenizer
from lora_cli.recipe.reader import read_recipe
from lora_cli.runs.rows import load_rows, planned

HOSTILE = "\x1b[2J\x1b]8;;http://evil\x07[/bold][link=x]\u202e\x9b31m"


@pytest.fixture
def rows_of(tiny_llama):
    """rows_of(recipe) -> the rows that training gets."""
    return lambda file: load_rows(read_recipe(file), load_tokenizer(tiny_llama))


def write(folder, *rows, name="train.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def shown(document) -> list[tuple]:
    return [(found["row"], found["input_ids"], found["weights"], found["cut"]) for found in document["examples"]]


@pytest.mark.parametrize("settings", [{}, {"data.eval": "25%"}, {"data.max_length": 12}], ids=str)
def test_what_is_shown_is_what_is_trained(settings, lora, recipe, rows_of):
    file = recipe(settings)
    rows = rows_of(file)

    train = lora("data", file, "--limit", 99, "--json").json
    assert shown(train) == [(e.row.number, e.input_ids, e.weights, e.cut) for e in rows.train]
    if rows.held_out:
        held_out = lora("data", file, "--held-out", "--limit", 99, "--json").json
        assert shown(held_out) == [(e.row.number, e.input_ids, e.weights, e.cut) for e in rows.held_out]


def test_trained_tokens_stand_in_brackets_where_there_is_no_colour(lora, recipe, tmp_path):
    file = recipe()
    write(tmp_path, {"prompt": "what is\n\nthat?", "completion": " the cat"})

    done = lora("data", file)

    header, *text = done.out.rstrip("\n").splitlines()
    assert header.startswith("─── train.jsonl:1 · ")
    assert header.endswith(" trained · cut 0")
    assert text == ["what is⏎", "⏎", "that?⟦ the cat<|im_end|>⟧"]


def test_tokens_are_separated_on_demand(lora, recipe, tmp_path):
    file = recipe()
    write(tmp_path, {"prompt": "the cat", "completion": " sat"})
    [found] = lora("data", file, "--json").json["examples"]

    text = lora("data", file, "--tokens").out.splitlines()[1]

    assert text.count("│") == len(found["input_ids"]) - 2  # between prompt and answer the bracket is the border
    assert text.replace("│", "").replace("⟦", "").replace("⟧", "") == "".join(found["texts"])


def test_weights_other_than_one_are_written(lora, recipe, tmp_path):
    file = recipe()
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the cat", "weight": 0.5}]
    write(tmp_path, {"messages": turns})

    assert "⟦the cat<|im_end|>⟧×0.5" in lora("data", file).out


def test_a_row_is_found_by_its_number_wherever_it_stands(lora, recipe, rows_of):
    file = recipe({"data.eval": "25%"})
    number = rows_of(file).held_out[0].row.number

    assert f"train.jsonl:{number} · " in lora("data", file, "--row", number).out
    assert lora("data", file, "--row", f"train.jsonl:{number}").out.splitlines()[0].endswith(" · held out")


def test_rows_are_chosen_by_source(lora, recipe, tmp_path):
    file = recipe({"data.train": ["train.jsonl", "more.jsonl"]})
    write(tmp_path, {"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}, name="more.jsonl")

    assert [e["source"] for e in lora("data", file, "--source", "more.jsonl", "--json").json["examples"]] == [
        "more.jsonl"
    ] * 2
    assert lora("data", file, "--row", 2, "--json").json["found"] == 2
    assert lora("data", file, "--row", "more.jsonl:2", "--json").json["found"] == 1


MISUSED = {
    "no such row": (["--row", "99"], "no example comes from row 99"),
    "no row": (["--row", "x"], "`--row x` is no row"),
    "no such source": (["--source", "trian.jsonl"], "no example comes from `trian.jsonl`\n  fix: there is train.jsonl"),
    "nothing held out": (["--held-out"], "`data.eval` is null: no rows are held out"),
    "no such step": (["--packed", "--step", "5"], "there is no step 5\n  fix: the steps are 1 to 4"),
    "two choices": (["--packed", "--row", "1"], "`--packed` shows the rows of a step"),
}


@pytest.mark.parametrize(("flags", "said"), MISUSED.values(), ids=MISUSED)
def test_what_is_not_there_is_exit_2_and_says_what_is(flags, said, lora, recipe):
    done = lora("data", recipe(), *flags, code=2)

    assert done.out == ""
    assert said in done.err


def test_packed_rows_are_those_that_the_step_trains(lora, recipe, rows_of):
    file = recipe({"data.max_length": 64, "training.micro_batch_size": 1})

    rows = lora("data", file, "--packed", "--step", 2, "--limit", 99, "--json").json["rows"]
    text = lora("data", file, "--packed", "--step", 2, "--limit", 99).out

    sizes = [sum(len(document["input_ids"]) for document in row["documents"]) for row in rows]
    assert sum(len(row["documents"]) for row in rows) == 4  # the global batch
    assert max(len(row["documents"]) for row in rows) > 1
    assert max(sizes) <= 64
    loaded, rows_trained = read_recipe(file), rows_of(file)
    plan = planned(loaded.recipe, rows_trained)
    _, taken = next(steps(rows_trained.train, plan, seed=loaded.recipe.training.seed, start=1))
    assert sorted(d["row"] for row in rows for d in row["documents"]) == sorted(e.row.number for e in taken)
    assert [line for line in text.splitlines() if line.startswith("═══")] == [
        f"═══ step 2 · row {number} of {len(rows)} · {len(row['documents'])} document"
        f"{'s' * (len(row['documents']) > 1)} · {size} tokens"
        for number, (row, size) in enumerate(zip(rows, sizes, strict=True), 1)
    ]
    assert text.count("─── train.jsonl:") == 4


def test_hostile_text_is_printed_inert(lora, recipe, tmp_path):
    file = recipe()
    write(tmp_path, {"prompt": HOSTILE, "completion": f" {HOSTILE}"})

    done = lora("data", file)

    assert not {"\x1b", "\u202e", "\x9b", "\x07"} & set(done.out)
    assert "\\x1b[2J" in done.out
    assert "[/bold][link=x]\\u202e" in done.out


def test_a_terminal_gets_colour_and_no_brackets(recipe, tmp_path):
    file = recipe()
    write(tmp_path, {"prompt": "the cat", "completion": " sat"})
    host, terminal = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm-256color"}
    command = [sys.executable, "-m", "lora_cli", "data", str(file)]

    subprocess.run(command, stdout=terminal, stderr=subprocess.DEVNULL, env=environment, timeout=120, check=True)

    os.close(terminal)
    text = os.read(host, 65536).decode()
    os.close(host)
    assert "\x1b[32m sat<|im_end|>\x1b[0m" in text
    assert "⟦" not in text


def test_both_sides_of_a_pair_are_shown_and_counted_and_nothing_trains_on_them(lora, recipe, tmp_path):
    file = recipe()
    write(tmp_path, *({"prompt": f"the cat {n}", "chosen": " sat", "rejected": " " + "mat " * n} for n in range(3, 9)))

    shown = lora("data", file, "--limit", 2).out.splitlines()
    checked = lora("check", file, code=3).out
    refused = lora("train", file, code=3).err

    assert shown[0].endswith(" trained · cut 0 · chosen")
    assert shown[1] == "the cat 3⟦ sat<|im_end|>⟧"
    assert shown[3].endswith(" trained · cut 0 · rejected")
    assert "warn  pairs       6 pairs; 2 trained tokens a chosen answer, " in checked
    assert "rows        6 (preference); 12 examples (two a pair) to train on, 0 held out" in checked
    what = "the rows are preferences (`chosen` and `rejected`), and no objective learns from them yet"
    assert f"fail  objective   {what}" in checked
    assert f"error: {what}" in refused


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("completion", {"prompt": "the cat", "chosen": " sat", "rejected": " mat"}),
        ("messages", {side: [{"role": "user", "content": "what"}, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}),
    ],
)  # fmt: skip
def test_the_chosen_answers_alone_are_learned_where_that_is_asked_for(format, row, lora, recipe, tmp_path):
    file = recipe({"data.format": format, "data.columns": {format: "chosen"}})
    write(tmp_path, row)

    [found] = lora("data", file, "--json").json["examples"]

    assert "side" not in found
    assert "rejected" not in "".join(found["texts"])
