"""What a person meets at the command line: help, errors with their exit codes, JSON, and text that stays inert."""

import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
import torch
from running import events, lora_process, write_rows
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM

from lora_cli.cli.console import inert
from lora_cli.cli.main import COMMANDS

HOSTILE = "\x1b[2J\x1b]8;;http://evil\x07[/bold][link=x]\u202e\x9b31m"
HEAVY = ("torch", "transformers", "numpy", "accelerate", "datasets", "bitsandbytes", "safetensors")


@pytest.fixture
def trained(lora, recipe, tmp_path):
    lora("train", recipe())
    return tmp_path / "out"


def assert_one_block(done, most_lines: int = 12) -> None:
    """What, where and how to put it right; on stderr alone, and short."""
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert len(done.err.rstrip("\n").splitlines()) <= most_lines
    assert "fix: " in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["eval", "--help"], ["compose", "--help"], ["diff", "--help"], ["--version"]],
)
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys; sys.argv = ['lora', *sys.argv[1:]]\n"
        "from lora_cli.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not found, found"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_names_every_command_and_no_arguments_are_help(lora):
    text = lora("--help").out

    for command in COMMANDS:
        assert f"\n  {command} " in text
    assert "..." not in text.split("Commands:")[1], "a summary is too long for its line"
    assert lora(code=None).out.split() == text.split()


def test_the_module_is_the_command(lora):
    assert lora_process("--version").out == lora("--version").out


def test_an_unknown_key_is_one_block_with_its_place(lora, recipe):
    file = recipe({"lora.rnak": 8})

    done = lora("train", file, code=2)

    assert_one_block(done)
    assert re.search(rf"--> {re.escape(str(file))}:\d+:3", done.err)
    assert "rnak: 8" in done.err


def test_many_mistakes_are_counted_within_twelve_lines(lora, recipe):
    done = lora("train", recipe({f"lora.unknown_{i}": i for i in range(20)}), code=2)

    assert_one_block(done)
    assert re.search(r"… and \d+ more$", done.err.rstrip())


@pytest.mark.parametrize("arguments", [["train"], ["train", "a.yaml", "--no-such"], ["no-such-command"], ["merge"]])
def test_a_misused_command_is_exit_2(arguments, lora):
    done = lora(*arguments, code=2)

    assert done.out == ""
    assert done.err


def test_data_errors_are_exit_3(lora, recipe, tmp_path):
    file = recipe()
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')

    done = lora("train", file, code=3)

    assert "error: " in done.err
    assert "train.jsonl:2" in done.err


def test_model_errors_are_exit_4(lora, recipe):
    done = lora("train", recipe({"model.base": "./nowhere"}), code=4)

    assert_one_block(done)


def test_an_unmatched_target_is_exit_4_and_leaves_no_run(lora, recipe, tmp_path):
    done = lora("train", recipe({"lora.targets": ["q_prj"]}), code=4)

    assert "`q_prj` in `lora.targets` matches no weight of this model that can get an adapter" in done.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_does_nothing_is_exit_6(lora, trained, tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(trained / "adapter_model.safetensors")
    save_file({k: t * (0 if "lora_B" in k else 1) for k, t in tensors.items()}, trained / "adapter_model.safetensors")

    done = lora("eval", "--adapter", trained, "--data", write_rows(tmp_path / "rows.jsonl"), code=6)

    assert_one_block(done)
    assert "the adapter does nothing: every lora_B is zero" in done.err


def test_a_pickled_adapter_is_exit_9(lora, trained):
    (trained / "adapter_model.safetensors").rename(trained / "adapter_model.bin")

    done = lora("generate", "--adapter", trained, "--prompt", "what", code=9)

    assert_one_block(done)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 7, "out of memory: CUDA out of memory."),
        (MemoryError(), 7, "out of memory"),
        (ZeroDivisionError("division by zero"), 1, "a bug in lora: ZeroDivisionError: division by zero"),
        (OSError(28, "No space left on device"), 5, "No space left on device"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["device memory", "host memory", "bug", "disk", "interrupt"],
)
def test_what_goes_wrong_inside_has_its_exit_code(error, code, text, lora, recipe, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("lora_cli.runs.train.prepare", fail)

    done = lora("train", recipe(), code=code)

    assert text in done.err
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback_with_the_same_exit_code_and_inert(lora, recipe):
    done = lora("train", recipe({"lora.r": 0, "model.base": f"./{HOSTILE}"}), "--debug", code=2)

    assert done.err.startswith("Traceback (most recent call last):")
    assert "RecipeError: error: `lora.r` must be at least 1, not `0`" in done.err
    assert not controls(done.out + done.err)


def test_json_is_exactly_one_document_on_stdout(lora, trained, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")

    assert set(lora("eval", "--adapter", trained, "--data", rows, "--json").json) >= {
        "base",
        "adapter",
        "rows",
        "tokens",
    }
    assert lora("generate", "--adapter", trained, "--prompt", "what", "--max-new-tokens", 2, "--json").json.keys() == {
        "what"
    }
    assert {"versions", "abilities"} == lora("doctor", "--json").json.keys()
    assert lora("params", "--json").json
    assert lora("merge", "--adapter", trained, "--json").json["out"] == str(trained / "merged")


# What a run has no use for, and what other packages would bring with them: seconds before the first step
UNUSED = {
    "peft",
    "bitsandbytes",
    "datasets",
    "pandas",
    "tensorboard",
    "transformers.trainer_utils",
    "torch._inductor.lowering",
}


def test_in_a_process_of_its_own_a_run_tells_its_progress_on_stderr_and_its_result_on_stdout(recipe, tmp_path):
    done = lora_process("train", recipe({"data.eval": "25%"}), PYTHONPROFILEIMPORTTIME="1")
    lines = done.err.splitlines()
    imports = [line for line in lines if line.startswith("import time:")]
    told = "\n".join(line for line in lines if line not in imports)

    assert "held-out loss" in done.out
    assert "lora merge --adapter" in done.out
    assert "saved step 4" in told
    assert "\x1b" not in done.out + told
    assert "Warning" not in told
    imported = {line.rpartition("|")[2].strip() for line in imports}
    assert "torch" in imported
    assert not imported & UNUSED


def test_doctor_knows_the_machine(lora):
    found = lora("doctor", "--json").json

    assert found["versions"]["torch"] == torch.__version__
    abilities = {ability["what"]: ability for ability in found["abilities"]}
    assert abilities["train on the CPU"]["possible"] is True
    assert abilities["quantize: nf4"]["possible"] is True
    assert abilities["quantize: int8"]["possible"] is True
    assert abilities["download from the hub"]["possible"] is False  # the tests are offline
    text = lora("doctor").out
    assert all(what in text for what in abilities)


def greedy(base, prompt: str, most: int) -> str:
    """The base's answer to a rendered prompt, one token after the other, without a cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), byte_tokenizer()
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + most and (len(ids) == start or ids[-1] not in (2, tokenizer.eos_token_id)):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_the_same_prompt_is_answered_by_base_and_adapter_side_by_side(lora, trained, tiny_llama):
    prompt = "what is the cat 0?"
    ask = ("generate", "--adapter", trained, "--prompt", prompt, "--max-new-tokens", 8)

    found = lora(*ask, "--json").json[prompt]
    text = lora(*ask).out

    assert found.keys() == {"base", "adapter"}
    assert found["base"] != found["adapter"]
    assert found["base"] == greedy(tiny_llama, prompt, 8)  # as it stands, for so it was in training
    assert re.search(r"> what is the cat 0\?\n  base .*\n?.*  adapter ", text, re.DOTALL)


TEMPLATES = {
    "what is {prompt} the [[{completion}]]": ("the cat", "what is the cat the "),
    "{prompt} yes {prompt} no {hint} [[{completion}]]": (
        '{"hint": 7, "prompt": "mat"}',
        "mat yes mat no 7 ",
    ),
}


@pytest.mark.parametrize(("template", "asked"), TEMPLATES.items(), ids=["one field", "several"])
def test_a_prompt_is_asked_through_the_text_template_of_the_rows(lora, recipe, tiny_llama, template, asked):
    prompt, text = asked
    file = recipe(
        {
            "data.template": template,
            "data.eval": "25%",
            "training.max_steps": 1,
            "training.eval_steps": 1,
            "training.sample_prompts": [prompt],
            "training.learning_rate": 1e-30,  # so that the adapter answers as the base does
        }
    )
    rows = [json.loads(line) | {"hint": "cat"} for line in (file.parent / "train.jsonl").read_text().splitlines()]
    (file.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    lora("train", file)

    out = file.parent / "out"
    [*_, sampled] = events(out, "sampled")
    assert sampled["samples"] == {prompt: greedy(tiny_llama, text, 96)}
    asked = ("generate", "--adapter", out, "--max-new-tokens", 4)
    found = lora(*asked, "--prompt", prompt, "--json").json
    assert found[prompt] == {who: greedy(tiny_llama, text, 4) for who in ("base", "adapter")}
    if "hint" in template:
        refused = lora(*asked, "--prompt", "mat", code=2)
        assert refused.err == (
            "error: `data.template` asks with 2 fields, and this prompt does not give them\n"
            "     | mat\n"
            '  fix: give a text for each field, as JSON: {"prompt": "…", "hint": "…"}\n'
        )


def test_answers_are_the_greedy_ones_and_do_not_depend_on_the_other_prompts(lora, tiny_llama):
    prompts = ["what", "what is the answer to that question", "mat"]

    together = lora("generate", "--base", tiny_llama, *(x for p in prompts for x in ("--prompt", p)), "--json").json

    for prompt in prompts:
        chat = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        assert together[prompt] == {"base": greedy(tiny_llama, chat, 96)}


def test_prompts_may_come_from_stdin_one_a_line(lora, tiny_llama, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"what\n\nmat\n")))

    found = lora("generate", "--base", tiny_llama, "--max-new-tokens", 1, "--json").json

    assert list(found) == ["what", "mat"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval"],
        ["eval", "--data", "x.jsonl"],
        ["generate", "--prompt", "x"],
        ["generate", "--base", "b", "--prompt", ""],
    ],
)
def test_a_question_without_a_model_rows_or_prompt_is_exit_2(arguments, lora, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))

    assert_one_block(lora(*arguments, code=None))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eevil", "\\u202eevil"),
        ("a\x00b\x07\r", "a\\x00b\\x07\\r"),
        ("\ud800", "\\ud800"),
        ("[/bold] :smile: [link=x]", "[/bold] :smile: [link=x]"),
        ("line\n\tnext é 中 🙂", "line\n\tnext é 中 🙂"),
    ],
)
def test_foreign_text_is_inert(text, shown):
    assert inert(text) == shown
    assert inert(inert(text)) == shown


def controls(text: str) -> list[str]:
    return [c for c in text if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c == "\u202e"]


def test_hostile_rows_prompts_and_names_reach_the_terminal_inert(lora, recipe, tmp_path):
    file = recipe({"training.sample_prompts": [HOSTILE], "data.eval": "25%"})
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write(json.dumps({"prompt": HOSTILE, "completion": HOSTILE}) + "\n")

    run = lora("train", file)
    asked = lora("generate", "--adapter", tmp_path / "out", "--prompt", HOSTILE, "--max-new-tokens", 4)
    missing = lora("generate", "--base", f"./{HOSTILE}", "--prompt", "x", code=None)
    nowhere = lora("train", f"{HOSTILE}.yaml", code=2)

    assert "\\x1b[2J" in run.err
    assert "\\x1b[2J" in asked.out
    for done in (run, asked, missing, nowhere):
        assert not controls(done.out + done.err)
    assert missing.code in (2, 4)


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What a terminal would get."""
    ours, theirs = pty.openpty()
    variables = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_cli", *arguments],
        stdout=theirs,
        stderr=theirs,
        stdin=theirs,
        env=variables | {"TERM": "xterm-256color"} | environment,
    )
    os.close(theirs)
    found = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not part:
            break
        found += part
    os.close(ours)
    assert process.wait() == 0
    return found.decode()


COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9]+)*m")


def test_no_color_is_respected_on_a_terminal():
    text = on_a_terminal("params", "--r", "8", "--targets", "qv", NO_COLOR="1")

    assert "4,194,304" in text
    assert not COLOUR.search(text)


def test_a_dry_run_trains_nothing_and_shows_where_values_come_from(lora, recipe, tmp_path):
    done = lora("train", recipe(), "--dry-run", "--set", "lora.r=2")

    assert "--set" in done.out
    assert "4 steps of 4 rows" in done.out
    assert not (tmp_path / "out").exists()


def test_set_overrides_and_is_recorded(lora, recipe, tmp_path):
    lora("train", recipe(), "--set", "lora.r=2", "--set", "training.max_steps=1")

    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["lora_alpha"] == 4
    assert re.search(r"r: 2 +# --set", (tmp_path / "out/recipe.yaml").read_text())
