"""An adapter knows the tokenizer it was trained with: other ids are refused, another template is said."""

import logging
from dataclasses import replace

import pytest
from adapters import random_adapter
from running import write_rows
from tiny import byte_tokenizer, tiny_base

from lora_cli.errors import ModelError
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


def swapped():
    """The same tokens; two of them have each other's ids."""
    tokenizer = byte_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    vocabulary = tokenizer.get_vocab()
    first, second = (token for token, id in sorted(vocabulary.items(), key=lambda item: item[1])[-2:])
    a, b = vocabulary[first], vocabulary[second]
    changed = text.replace(f'"{first}":{a}', f'"{first}":{b}').replace(f'"{second}":{b}', f'"{second}":{a}')
    return type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(changed),
        chat_template=tokenizer.chat_template,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
    )


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
    [(swapped, "has other tokens or other ids"), (lowered, "cuts texts into other tokens")],
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
    swapped().save_pretrained(changed)
    more = {
        "eval": ["--data", write_rows(tmp_path / "rows.jsonl")],
        "generate": ["--prompt", "x", "--max-new-tokens", 1],
        "merge": [],
        "export": ["--to", "merged"],
    }

    done = lora(command, "--adapter", tmp_path / "out", "--base", changed, *more[command], code=4)

    assert "this tokenizer has other tokens or other ids than the one the adapter was trained with" in done.err
    lora(command, "--adapter", tmp_path / "out", *more[command])


def test_a_run_records_the_tokenizer_it_trained_with(lora, recipe, tmp_path, tiny_llama):
    lora("train", recipe())

    assert load_adapter(tmp_path / "out").tokenizer == tokenizer_identity(load_tokenizer(tiny_llama))
