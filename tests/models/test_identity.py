"""An adapter knows the tokenizer it was trained with: other ids are refused, another template is said."""

import logging
import re
import shutil
from dataclasses import replace

import pytest
import torch
from adapters import random_adapter
from running import hashes, write_rows
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, swapped_tokenizer, tiny_base

from lora_cli.errors import ModelError
from lora_cli.lora.adapter import Factors
from lora_cli.lora.base_files import read_metadata
from lora_cli.lora.identity import TokenizerFingerprint
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.models.identity import check_tokenizer, tokenizer_identity
from lora_cli.models.load import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapter(base):
    return replace(random_adapter(base, "q"), tokenizer=tokenizer_identity(load_tokenizer(base)))


def lowered():
    """The same tokens and ids; texts are cut otherwise."""
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def test_a_copy_that_was_saved_and_loaded_is_the_same_tokenizer(base, adapter, tmp_path):
    tokenizer = load_tokenizer(base)
    for n in range(2):
        tokenizer.save_pretrained(tmp_path / str(n))
        tokenizer = load_tokenizer(tmp_path / str(n))

    assert tokenizer_identity(tokenizer) == adapter.tokenizer
    check_tokenizer(adapter, tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("other", "what"),
    [(swapped_tokenizer, "has other tokens or other ids"), (lowered, "cuts texts into other tokens")],
)
def test_other_ids_are_refused_unless_they_are_allowed(other, what, adapter, tmp_path, caplog):
    with pytest.raises(ModelError) as error:
        check_tokenizer(adapter, other(), tmp_path)
    with caplog.at_level(logging.WARNING, "lora_cli"):
        check_tokenizer(adapter, other(), tmp_path, allow=True)

    assert error.value.problems[0].what == f"this tokenizer {what} than the one the adapter was trained with"
    assert what in caplog.text


def test_another_template_is_said_and_no_tokenizer_known_fits_all(adapter, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lora_cli"):
        check_tokenizer(adapter, byte_tokenizer("{{ messages }}"), tmp_path)
        check_tokenizer(adapter, byte_tokenizer(None), tmp_path)
        check_tokenizer(replace(adapter, tokenizer=None), lowered(), tmp_path)

    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: its chat template is not the one that the adapter was trained with"
    ] * 2


def test_the_fingerprint_travels_in_the_metadata(adapter, tmp_path):
    save_adapter(replace(adapter, origin={"command": "compose"}), tmp_path)

    found = load_adapter(tmp_path)

    assert found.tokenizer == adapter.tokenizer
    assert found.origin == {"command": "compose"}
    assert TokenizerFingerprint.from_json(adapter.tokenizer.to_json()) == adapter.tokenizer


@pytest.mark.parametrize("command", ["eval", "generate", "merge", "export"])
def test_every_command_refuses_another_tokenizer_of_the_base(command, lora, base, adapter, tmp_path):
    """Two files alone, copied out of their run folder, onto a base whose tokenizer has changed since."""
    named = replace(adapter, config=replace(adapter.config, base_model_name_or_path=str(base)))
    save_adapter(named, tmp_path / "out")
    changed = tiny_base(tmp_path / "changed")
    swapped_tokenizer().save_pretrained(changed)
    more = {
        "eval": ["--data", write_rows(tmp_path / "rows.jsonl")],
        "generate": ["--prompt", "x", "--max-new-tokens", 1],
        "merge": [],
        "export": ["--to", "merged"],
    }

    done = lora(command, "--adapter", tmp_path / "out", "--base", changed, *more[command], code=4)

    assert "this tokenizer has other tokens or other ids than the one the adapter was trained with" in done.err
    lora(command, "--adapter", tmp_path / "out", *more[command])


COMMANDS = {
    "eval": lambda tmp_path: ["eval", "--data", write_rows(tmp_path / "rows.jsonl"), "--adapter"],
    "generate": lambda tmp_path: ["generate", "--prompt", "x", "--max-new-tokens", 1, "--adapter"],
    "merge": lambda tmp_path: ["merge", "--out", tmp_path / "made", "--adapter"],
    "inspect": lambda tmp_path: ["inspect"],
    "compose": lambda tmp_path: ["compose", "--out", tmp_path / "made"],
    "resize": lambda tmp_path: ["resize", "--r", 2, "--out", tmp_path / "made"],
} | {
    f"export --to {to}": lambda tmp_path, to=to: ["export", "--to", to, "--out", tmp_path / "made", "--adapter"]
    for to in ("peft", "merged", "gguf-adapter", "ollama", "mlx", "vllm", "sglang")
}  # fmt: skip


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Another base of the same shape: only its value projections are other ones, as if an adapter had been merged."""
    folder = tiny_base(tmp_path_factory.mktemp("elsewhere") / "llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: W * (1.01 if "v_proj" in name else 1) for name, W in tensors.items()}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_another_base_of_the_same_shape_and_names_its_tensors(
    command, lora, adapter, elsewhere, tmp_path
):
    save_adapter(adapter, tmp_path / "out")
    before = hashes(tmp_path / "out")

    done = lora(*COMMANDS[command](tmp_path), tmp_path / "out", "--base", elsewhere, code=4)

    assert (
        "the adapter was trained on another base: they differ in model.layers.0.self_attn.v_proj.weight, "
        "model.layers.1.self_attn.v_proj.weight\n" in done.err
    )
    assert "accept this one with `--allow-base-mismatch`" in done.err
    assert hashes(tmp_path / "out") == before
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_another_base_that_is_allowed_is_said_by_every_command(command, lora, adapter, elsewhere, tmp_path):
    save_adapter(adapter, tmp_path / "out")

    done = lora(*COMMANDS[command](tmp_path), tmp_path / "out", "--base", elsewhere, "--allow-base-mismatch")

    assert re.search(r"NOT (the base it was trained on|of one base) .--allow-base-mismatch", done.out + done.err)
    assert "model.layers.0.self_attn.v_proj.weight" in done.out + done.err


def not_a_number(tensors):
    tensors[next(iter(tensors))][0, 0] = torch.nan
    return tensors


def narrower(tensors):
    return {name: W[:, :-2].contiguous() if "lora_A" in name else W for name, W in tensors.items()}


# What is done to the tensors of an adapter's file: (the change, exit code, what is said)
DAMAGES = {
    "values that are not finite": (not_a_number, 6, "the adapter holds values that are not finite in 1 layers"),
    "every B zero": (
        lambda tensors: {name: W * ("lora_A" in name) for name, W in tensors.items()},
        6,
        "the adapter does nothing: every lora_B is zero",
    ),
    "a layer lost": (
        lambda tensors: {name: W for name, W in tensors.items() if ".layers.1." not in name},
        4,
        "its config names 2 modules of this base, and 1 of them have no factors, first model.layers.1.self_attn.q_proj",
    ),
    "a factor lost": (
        lambda tensors: {name: W for name, W in tensors.items() if ".1.self_attn.q_proj.lora_A" not in name},
        4,
        "model.layers.1.self_attn.q_proj lacks lora_A",
    ),
    "another shape": (narrower, 4, "model.layers.0.self_attn.q_proj is [32, 32] in this base, and [32, 30] in the adapter"),
    "another rank": (
        lambda tensors: {name: W[:2] if "lora_A" in name else W[:, :2].contiguous() for name, W in tensors.items()},
        4,
        "has factors (2, 32) and (32, 2), and adapter_config.json says rank 4",
    ),
}  # fmt: skip
LOOKING = ("inspect",)  # shows what is dead, and so does not refuse it


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_command_refuses_an_adapter_that_is_damaged(damage, command, lora, base, adapter, tmp_path):
    change, code, said = DAMAGES[damage]
    save_adapter(adapter, tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, read_metadata(file))
    if damage == "every B zero" and command in LOOKING:
        code, said = 0, ""

    done = lora(*COMMANDS[command](tmp_path), tmp_path / "out", "--base", base, code=code)

    assert said in done.err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("command", ["eval", "generate", "merge", "inspect", "compose", "export --to merged"])
def test_a_dead_dora_is_known_beside_its_base(command, lora, base, adapter, tmp_path):
    """Every B zero, and every magnitude the base's own; one that has moved does something."""
    dora = random_adapter(base, "q", use_dora=True)
    tensors = load_file(base / "model.safetensors")
    norms = {path: tensors[f"{path}.weight"].norm(dim=1) for path in dora.layers}
    for name, factor in (("dead", 1.0), ("alive", 1.01)):
        layers = {path: Factors(f.A, torch.zeros_like(f.B), factor * norms[path]) for path, f in dora.layers.items()}
        save_adapter(replace(dora, layers=layers), tmp_path / name)

    alive = lora(*COMMANDS[command](tmp_path), tmp_path / "alive", "--base", base)
    shutil.rmtree(tmp_path / "made", ignore_errors=True)
    dead = lora(*COMMANDS[command](tmp_path), tmp_path / "dead", "--base", base, code=0 if command in LOOKING else 6)

    said = {"inspect": "2 modules change nothing", "compose": "the sum does nothing"}
    assert said.get(command, "the adapter does nothing: every lora_B is zero") in dead.out + dead.err
    assert " nothing" not in alive.out + alive.err
    assert not (tmp_path / "made").exists()


def test_a_run_records_the_tokenizer_it_trained_with(lora, recipe, tmp_path, tiny_llama):
    lora("train", recipe())

    assert load_adapter(tmp_path / "out").tokenizer == tokenizer_identity(load_tokenizer(tiny_llama))
