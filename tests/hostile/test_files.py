"""Bases, tokenizers, templates, adapters, rows and run folders from someone who means harm, through the real commands.

A case is a line of a table: what is done to good files, the exit code, and what is said. All must hold the oracle of
tests/hostile_files.py.
"""

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile_files import (
    CANARY,
    PWNED,
    TERMINAL,
    Payload,
    change_header,
    change_json,
    deep,
    harmless,
    link_out,
    refused,
    safetensors_file,
    watched,
)
from running import lora, write_recipe  # noqa: F401  `lora` is a fixture
from safetensors.torch import load_file, save_file
from tiny import tiny_base

from lora_cli.data import chat_template
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.peft_format import save_adapter

PATHS = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
BAD_NAMES = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
DISGUISED = pickle.dumps(Payload())


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Path:
    """A base and an adapter of it, as a person would have them."""
    folder = tmp_path_factory.mktemp("good")
    base = tiny_base(folder / "base")
    torch.manual_seed(0)
    layers = {path: Factors(torch.randn(4, 32), torch.randn(32, 4)) for path in PATHS}
    config = LoRAConfig(r=4, lora_alpha=8, target_modules=("q_proj",), base_model_name_or_path="base")
    save_adapter(Adapter(config, layers, fingerprint(base)), folder / "adapter")
    return folder


@pytest.fixture
def work(good, tmp_path, monkeypatch) -> Path:
    """Copies of them in the current folder, with rows and a recipe, and something outside that must not be touched."""
    work = tmp_path / "work"
    shutil.copytree(good, work)
    write_recipe(work, Path("base"), {"output": "out"})
    (tmp_path / "victim.txt").write_text(f"a secret: {CANARY}\n")
    monkeypatch.chdir(work)
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 0.5)
    return work


Change = Callable[[Path], object]
Case = tuple[Change, int, str]


def rename_weights(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(DISGUISED)

    return change


def index(**weight_map: str) -> Change:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def config(**changed: object) -> Change:
    return lambda folder: change_json(folder / "config.json", **changed)


def tokenizer_config(**changed: object) -> Change:
    return lambda folder: change_json(folder / "tokenizer_config.json", **changed)


def file(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def header(change: Callable[[dict], object], name: str = "model.safetensors") -> Change:
    return lambda folder: change_header(folder / name, change)


def first(header: dict) -> dict:
    """The tensor that lies first in the file."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return min(entries.values(), key=lambda entry: entry["data_offsets"])


def brings_code(folder: Path) -> None:
    """A base with an architecture, and a tokenizer with a class, of its own."""
    (folder / "evil.py").write_text(PWNED)
    change_json(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


MERGE = ("merge", "--adapter", "adapter", "--base", "base")

BASES: dict[str, Case] = {
    "code of its own": (brings_code, 9, "brings its own code (`auto_map`)"),
    "custom code": (config(custom_code="x"), 9, "`custom_code`"),
    "trust from inside": (config(trust_remote_code=True), 9, "`trust_remote_code`"),
    "trust inside a part": (config(text_config={"trust_remote_code": True}), 9, "`text_config.trust_remote_code`"),
    "a kernel from the hub": (
        config(_attn_implementation_internal="evil/kernel"),
        9,
        "`_attn_implementation_internal`",
    ),
    "a kernel by name": (config(attn_implementation="evil"), 9, "`attn_implementation`"),
    "a kernel inside a part": (config(sub={"_attn_implementation": "e/k"}), 9, "`sub._attn_implementation`"),
    "code of another repository": (config(loader="evil/repo--module.Class"), 9, "`loader`"),
    "generation by code": (file("generation_config.json", '{"custom_generate": "evil/repo"}'), 9, "`custom_generate`"),
    "a tokenizer with trust": (tokenizer_config(trust_remote_code=True), 9, "`trust_remote_code`"),
    "a processor with code": (file("processor_config.json", '{"x": "e/r--m.C"}'), 9, "code from elsewhere: `x`"),
    "a pickle": (rename_weights("pytorch_model.bin"), 9, "as a pickle"),
    "a pickle named .pt": (rename_weights("model.pt"), 9, "as a pickle"),
    "a pickle named .pth": (rename_weights("consolidated.00.pth"), 9, "as a pickle"),
    "a pickle named .ckpt": (rename_weights("model.ckpt"), 9, "as a pickle"),
    "a pickle named safetensors": (file("model.safetensors", DISGUISED), 4, "its header can't be read"),
    "an index of a pickle": (
        both(index(a="pytorch_model.bin"), file("pytorch_model.bin", DISGUISED)),
        9,
        "a file that is no safetensors",
    ),
    "an index that leads out": (index(a="../../victim.safetensors"), 9, "points outside its folder"),
    "an index of the whole disk": (index(a="/etc/x.safetensors"), 9, "points outside its folder"),
    "an index of nothing": (index(), 4, "its `weight_map` can't be read"),
    "an index for the terminal": (index(a=f"{TERMINAL}.safetensors"), 9, "points outside its folder"),
    "an index that is deep": (file("model.safetensors.index.json", deep()), 4, "nested too deeply"),
    "a shard that is not there": (index(a="model-9.safetensors"), 4, "model-9.safetensors is missing"),
    "a header without end": (file("model.safetensors", b"\xff" * 64), 4, "its header can't be read"),
    "a header that is a page": (file("model.safetensors", "<html>" * 100), 4, "its header can't be read"),
    "a pointer of git-lfs": (file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), 4, "git-lfs"),
    "a deep header": (file("model.safetensors", safetensors_file(deep().encode())), 4, "its header can't be read"),
    "a tensor twice": (
        file("model.safetensors", safetensors_file(b'{"a": {}, "a": {}}')),
        4,
        "its header can't be read",
    ),
    "a tensor beyond the file": (
        header(lambda h: first(h).update(shape=[2**40], data_offsets=[0, 2**42])),
        4,
        "its header can't be read",
    ),
    "a tensor below zero": (header(lambda h: first(h).update(data_offsets=[-8, 8])), 4, "its header can't be read"),
    "a tensor over another": (
        header(
            lambda h: [entry.update(data_offsets=first(h)["data_offsets"]) for k, entry in h.items() if k[0] != "_"]
        ),
        4,
        "its header can't be read",
    ),
    "a tensor larger than its bytes": (header(lambda h: first(h).update(shape=[2**62])), 4, "header can't be read"),
    "a type that is none": (header(lambda h: first(h).update(dtype=TERMINAL)), 4, "its header can't be read"),
    "metadata of another kind": (header(lambda h: h.update(__metadata__=[1])), 4, "its header can't be read"),
    "a config of 21 MB": (config(x="x" * 21_000_000), 9, "it is larger than 20,000,000 bytes"),
    "a deep config": (file("config.json", deep()), 4, "nested too deeply"),
    "a config that is a list": (file("config.json", "[]"), 4, "it is no JSON object"),
    "a config of bytes": (file("config.json", b"\xff\xfe\x00"), 4, "it is no JSON"),
    "a config from outside": (
        lambda folder: link_out(folder / "config.json", folder.parents[1] / "victim.txt"),
        4,
        "it is no JSON",
    ),
    "a billion layers": (config(num_hidden_layers=10**9), 9, "`num_hidden_layers: 1000000000`"),
    "a billion layers inside": (config(text_config={"n_layers": 1e9}), 9, "`text_config.n_layers: 1000000000.0`"),
    "less than no layers": (config(num_hidden_layers=-1), 9, "`num_hidden_layers: -1`"),
    "a tokenizer file from outside": (
        lambda folder: link_out(folder / "special_tokens_map.json", folder.parents[1] / "victim.txt"),
        4,
        "it is no JSON",
    ),
    "a licence from outside": (
        lambda folder: link_out(folder / "LICENSE", folder.parents[1] / "victim.txt"),
        9,
        "a link that leads out of its folder",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_a_hostile_base_is_not_merged_into(lora, work, case):  # noqa: F811
    change, code, says = BASES[case]
    change(work / "base")

    refused(lora, *MERGE, folder=work.parent, code=code, says=says)


MODELS: dict[str, Case] = {
    "heads of no size": (config(num_attention_heads=0), 4, "can't be loaded"),
    "a width that is text": (config(hidden_size=TERMINAL), 4, "can't be loaded"),
    "an unknown type": (config(model_type=TERMINAL), 4, "can't be loaded"),
    "a pickle": (rename_weights("pytorch_model.bin"), 9, "as a pickle"),
    "an index of a pickle": (
        both(index(a="pytorch_model.bin"), rename_weights("pytorch_model.bin")),
        9,
        "a file that is no safetensors",
    ),
    "quantised by nothing": (config(quantization_config=[1]), 4, "can't be loaded"),
    "a generation config of another kind": (file("generation_config.json", "[1]"), 4, "no JSON object"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_hostile_base_is_not_loaded(lora, work, case):  # noqa: F811
    change, code, says = MODELS[case]
    change(work / "base")

    refused(lora, "generate", "--base", "base", "--prompt", "x", folder=work.parent, code=code, says=says)


def template(text: str) -> Change:
    return file("chat_template.jinja", text)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
TEMPLATES: dict[str, Case] = {
    "loops": (template(LOOPS), 9, "takes more than 0.5 s of processor time"),
    "loops in a generation block": (template(f"{{% generation %}}{LOOPS}{{% endgeneration %}}"), 9, "processor time"),
    "a power": (template("{{ 10 ** (10 ** 9) }}"), 9, "takes more than 0.5 s of processor time"),
    "lorem ipsum": (template("{{ lipsum(10 ** 6) }}"), 9, "processor time"),
    "a text of gigabytes": (template("{{ 'a' * 10 ** 11 }}"), 9, "takes more than 1 GB of memory"),
    "a row times gigabytes": (template("{{ messages[0].content * 10 ** 10 }}"), 9, "takes more than 1 GB of memory"),
    "a list of gigabytes": (template("{{ ([0] * 10 ** 10) | length }}"), 9, "takes more than 1 GB of memory"),
    "doubling": (template(DOUBLING), 9, "takes more than"),
    "megabytes of output": (template("{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}"), 9, "characters"),
    "100 KB of template": (template("{# x #}" * 15_000), 9, "the chat template has 105,000 characters"),
    "a range without end": (template("{% for i in range(10 ** 9) %}{% endfor %}"), 3, "Range too big"),
    "recursion": (template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), 3, "the chat template refuses it"),
    "the classes of Python": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), 9, "out of its sandbox"),
    "the globals of a helper": (
        template("{{ cycler.__init__.__globals__.os.popen('id').read() }}"),
        9,
        "out of its sandbox",
    ),
    "the globals of lipsum": (template("{{ lipsum.__globals__['os'].system('id') }}"), 9, "out of its sandbox"),
    "format's way around": (
        template("{{ '{0.__class__}'.format(messages) }}"),
        4,
        "without a stop token",
    ),  # says nothing
    "attr's way around": (template("{{ (''|attr('__class__')).__mro__ }}"), 9, "out of its sandbox"),
    "changing the messages": (template("{{ messages.append(1) }}"), 9, "out of its sandbox"),
    "a file": (template("{% include '/etc/passwd' %}"), 3, "the chat template refuses it"),
    "no template": (template("{% for %}"), 4, "the chat template can't be read"),
    "an exception for the terminal": (template("{{ raise_exception('\x1b[2J\u202e') }}"), 3, "\\x1b[2J\\u202e"),
    "templates without a default": (
        tokenizer_config(chat_template=[{"name": "x", "template": "x"}]),
        4,
        "nor several of which one is called `default`",
    ),
    "a template that is a number": (tokenizer_config(chat_template=7), 4, "`chat_template` is not a text"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_hostile_template_ends_with_one_clear_error(lora, work, case):  # noqa: F811
    change, code, says = TEMPLATES[case]
    if "default" in case or "number" in case:
        (work / "base/chat_template.jinja").unlink(missing_ok=True)
    change(work / "base")
    (work / "train.jsonl").write_text('{"instruction": "what", "output": "yes"}\n' * 30)

    refused(lora, "data", "recipe.yaml", folder=work.parent, code=code, says=says)


def own_tokenizer(folder: Path) -> None:
    (folder / "evil.py").write_text(PWNED)
    (folder / "tokenizer.json").unlink()
    change_json(
        folder / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
    )


TOKENIZERS: dict[str, Case] = {
    "code of its own": (own_tokenizer, 9, "code"),
    "no JSON": (file("tokenizer.json", "{"), 4, "the tokenizer can't be loaded"),
    "a deep tokenizer": (file("tokenizer.json", deep()), 4, "the tokenizer can't be loaded"),
    "a tokenizer of nothing": (file("tokenizer.json", "{}"), 4, "the tokenizer can't be loaded"),
    "a model of no kind": (file("tokenizer.json", '{"version": "1.0", "model": {"type": "X"}}'), 4, "can't be loaded"),
    "a token that is a list": (tokenizer_config(eos_token=[1]), 4, "tokenizer"),
    "an end token of no text": (tokenizer_config(eos_token=None), 4, "names no end token"),
    "a class for the terminal": (tokenizer_config(tokenizer_class=TERMINAL, padding_side="\x1b[2J"), 4, "tokenizer"),
    "a config that is a list": (file("tokenizer_config.json", "[]"), 4, "no JSON object"),
    "a deep config": (file("tokenizer_config.json", deep()), 4, "nested too deeply"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(lora, work, case):  # noqa: F811
    change, code, says = TOKENIZERS[case]
    change(work / "base")

    refused(lora, "data", "recipe.yaml", folder=work.parent, code=code, says=says)


def adapter_config(**changed: object) -> Change:
    return lambda folder: change_json(folder / "adapter_config.json", **changed)


def only(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        (folder / name).write_bytes(DISGUISED)

    return change


def tensors(change: Callable[[dict], object]) -> Change:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        change(found)
        save_file(found, folder / "adapter_model.safetensors")

    return rewrite


def adapter_header(change: Callable[[dict], object]) -> Change:
    return header(change, "adapter_model.safetensors")


def weights(content: bytes) -> Change:
    return file("adapter_model.safetensors", content)


EMPTY_TENSORS = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
SLOW_PATTERN = {"([a-z._0-9]+)+!": 4}

ADAPTERS: dict[str, Case] = {
    "a pickle": (only("adapter_model.bin"), 9, "adapter_model.bin is a pickle"),
    "a pickle named .pt": (only("adapter_model.pt"), 9, "adapter_model.pt is a pickle"),
    "a pickle named .pth": (only("x.pth"), 9, "x.pth is a pickle"),
    "a pickle named .ckpt": (only("x.ckpt"), 9, "x.ckpt is a pickle"),
    "a pickle named safetensors": (weights(DISGUISED), 4, "its header can't be read"),
    "a header without end": (weights(b"\xff" * 64), 4, "its header can't be read"),
    "a header of a megabyte": (weights(safetensors_file(EMPTY_TENSORS)), 9, "its header has"),
    "a deep header": (weights(safetensors_file(deep(50_000).encode())), 4, "its header can't be read"),
    "a tensor twice": (weights(safetensors_file(b'{"a": {}, "a": {}}')), 4, "its header can't be read"),
    "a tensor beyond the file": (
        adapter_header(lambda h: first(h).update(shape=[2**40], data_offsets=[0, 2**42])),
        4,
        "its header can't be read",
    ),
    "no tensor": (weights(safetensors_file({})), 4, "no LoRA factors at all"),
    "not a number": (tensors(lambda t: t[BAD_NAMES.format("A")].fill_(float("nan"))), 6, "not finite"),
    "infinity": (tensors(lambda t: t[BAD_NAMES.format("B")].fill_(float("inf"))), 6, "not finite"),
    "a name for the terminal": (tensors(lambda t: t.update({TERMINAL: torch.ones(1)})), 4, "no LoRA factors"),
    "a name that leads out": (
        tensors(
            lambda t: t.update(
                {BAD_NAMES.format(x).replace("model.layers", "../../x"): torch.ones(4, 4) for x in ("A", "B")}
            )
        ),
        4,
        "base",
    ),
    "a path for the terminal": (
        tensors(
            lambda t: t.update({f"base_model.model.{TERMINAL}.lora_{x}.weight": torch.ones(4, 4) for x in ("A", "B")})
        ),
        4,
        "base",
    ),
    "another method": (adapter_config(peft_type=TERMINAL), 4, "`peft_type` is"),
    "a config of megabytes": (adapter_config(x="x" * 1_000_001), 9, "it is larger than 1,000,000 bytes"),
    "a deep config": (file("adapter_config.json", deep()), 4, "nested too deeply"),
    "a config that is a list": (file("adapter_config.json", "[]"), 4, "it is no JSON object"),
    "a config with a key twice": (
        file("adapter_config.json", '{"peft_type": "LORA", "r": 4, "r": 8}'),
        4,
        "a name stands twice",
    ),
    "a rank without end": (adapter_config(r=10**400), 4, "must be a whole number above 0"),
    "a rank of a billion": (adapter_config(r=10**9), 4, "says rank 1000000000"),
    "a rank that is true": (adapter_config(r=True), 4, "must be a whole number above 0"),
    "an alpha that is no number": (adapter_config(lora_alpha=float("nan")), 4, "must be a number above 0"),
    "a pattern for years": (adapter_config(rank_pattern=SLOW_PATTERN), 9, "takes more than 1 s of processor time"),
    "a pattern that is none": (adapter_config(alpha_pattern={"(": 1}), 4, "must be patterns"),
    "modules of its own": (adapter_config(modules_to_save=["lm_head"]), 4, "the adapter lacks lm_head"),
    "a fingerprint of nothing": (
        adapter_header(lambda h: h.update(__metadata__={"lora.base_fingerprint": deep()})),
        4,
        "fingerprint",
    ),
    "a vocabulary from outside": (
        lambda folder: [
            *(
                shutil.copy(folder.parent / "base" / name, folder)
                for name in ("tokenizer.json", "tokenizer_config.json")
            ),
            link_out(folder / "vocab.txt", folder.parents[1] / "victim.txt"),
        ],
        9,
        "a link that leads out of its folder",
    ),
    "rows for the proof that are none": (file("proof_rows.json", deep()), 4, "it is damaged"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_hostile_adapter_is_not_merged(lora, work, case):  # noqa: F811
    change, code, says = ADAPTERS[case]
    change(work / "adapter")

    refused(lora, *MERGE, folder=work.parent, code=code, says=says)


NAMED_BASES: dict[str, Case] = {
    "a path that leads out": (adapter_config(base_model_name_or_path="../../victim"), 4, "no model folder"),
    "the whole disk": (adapter_config(base_model_name_or_path="/"), 4, "no config.json"),
    "an address": (adapter_config(base_model_name_or_path="http://127.0.0.1:9/x"), 4, "no model folder"),
    "a name for the terminal": (adapter_config(base_model_name_or_path=TERMINAL), 4, "\\x1b[2J"),
    "a number": (adapter_config(base_model_name_or_path=7), 4, "must be a text or null"),
    "a hub id that is none": (adapter_config(base_model_name_or_path="a--b/..c"), 4, "a--b/..c"),
    "a revision that leads out": (
        adapter_config(base_model_name_or_path="a/b", revision="../../x"),
        4,
        "neither a folder here nor in the hub's cache",
    ),
    "a recipe with a tag": (file("recipe.yaml", "model: !!python/name:os.system x\n"), 9, "YAML tag"),
    "a recipe of nothing": (file("recipe.yaml", ""), 2, "the recipe is empty"),
    "a tokenizer with trust": (file("tokenizer_config.json", '{"trust_remote_code": true}'), 9, "`trust_remote_code`"),
}


@pytest.mark.parametrize("case", NAMED_BASES)
def test_what_a_hostile_adapter_names_is_not_followed(lora, work, case):  # noqa: F811
    change, code, says = NAMED_BASES[case]
    change(work / "adapter")

    refused(lora, "generate", "--adapter", "adapter", "--prompt", "x", folder=work.parent, code=code, says=says)


def test_what_peft_would_import_for_an_adapter_is_not_taken_along(lora, work):  # noqa: F811
    change_json(
        work / "adapter/adapter_config.json", auto_mapping={"base_model_class": "system", "parent_library": "os"}
    )
    (work / "adapter/evil.py").write_text(PWNED)

    with watched(work) as seen:
        done = lora("export", "--adapter", "adapter", "--to", "peft", "--out", "exported")

    harmless(done, seen)
    assert {file.name for file in Path("exported").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert "auto_mapping" not in Path("exported/adapter_config.json").read_text()


GOOD_ROW = json.dumps({"prompt": "what", "completion": "yes"})
ROWS: dict[str, tuple[str, str | bytes, str]] = {
    "a deep row": ("x.jsonl", deep(), "nested too deeply"),
    "a row of 11 MB": ("x.jsonl", json.dumps({"text": "x" * 11_000_000}), "at most 10,000,000"),
    "a key twice": ("x.jsonl", '{"text": "a", "text": "b"}', "stands twice"),
    "half a character": ("x.jsonl", '{"text": "\\ud800"}', "surrogate"),
    "a NUL": ("x.jsonl", '{"text": "a\0"}', "a NUL byte"),
    "bytes that are no text": ("x.jsonl", b'{"text": "\xff"}', "is not UTF-8"),
    "no number": ("x.jsonl", '{"text": NaN}', "NaN is not a JSON number"),
    "a number without end": ("x.jsonl", '{"input_ids": [' + "9" * 5000 + "]}", "not JSON"),
    "a token below zero": ("x.jsonl", '{"input_ids": [-1, 2]}', "not a token"),
    "a column for the terminal": ("x.jsonl", json.dumps({TERMINAL: 1}), "\\x1b[2J"),
    "a role for the terminal": (
        "x.jsonl",
        json.dumps({"messages": [{"role": TERMINAL, "content": "x"}]}),
        "\\x1b[2J",
    ),
    "no parquet": ("x.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", "not Parquet"),
    "no gzip": ("x.jsonl.gz", b"\x1f\x8b\x08" + b"\xff" * 50, "is damaged"),
    "a list that is deep": ("x.json", "[" * 100_000, "nested too deeply"),
    "a csv of quotes": ("x.csv", '"' * 9, "not CSV"),
    "a pickle": ("x.pkl", DISGUISED, "no form known here"),
    "a pickle named jsonl": ("x.jsonl", DISGUISED, "is not UTF-8"),
    "a NumPy file": ("x.npy", b"\x93NUMPY", "no form known here"),
}


@pytest.mark.parametrize("case", ROWS)
def test_hostile_rows_are_refused(lora, work, case):  # noqa: F811
    name, content, says = ROWS[case]
    (work / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    refused(lora, "data", "recipe.yaml", "--set", f"data.train={name}", folder=work.parent, code=3, says=says)


def test_rows_that_unpack_to_far_more_than_they_are_are_refused(lora, work):  # noqa: F811
    (work / "x.jsonl.gz").write_bytes(gzip.compress(bytes(130_000_000)))

    says = "it unpacks to more than 200 times its size"
    refused(lora, "data", "recipe.yaml", "--set", "data.train=x.jsonl.gz", folder=work.parent, code=9, says=says)


SOURCES = {
    "a file outside": ("../victim.txt/../../victim.txt", "does not exist"),
    "the passwords": ("/etc/passwd", "no form known here"),
    "a device": ("/dev/zero", "does not exist"),
    "an address": ("http://127.0.0.1:9/x.jsonl", "does not exist"),
    "a name for the terminal": (f"./{TERMINAL.replace('[', '')}.jsonl", "does not exist"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_hostile_source_is_not_followed(lora, work, case):  # noqa: F811
    source, says = SOURCES[case]
    found = json.dumps(source)

    refused(lora, "data", "recipe.yaml", "--set", f"data.train={found}", folder=work.parent, code=3, says=says)


RUNS: dict[str, tuple[Change, str]] = {
    "the folder": (lambda work: link_out(work / "out", work.parent / "elsewhere"), "the output is a symbolic link"),
    "the lock": (lambda work: inside(work, "run.lock"), "a run writes through none"),
    "a draft": (lambda work: inside(work, ".tmp-run.json"), "a run writes through none"),
    "the events": (lambda work: inside(work, "events.jsonl"), "a run writes through none"),
    "the checkpoints": (lambda work: inside(work, "checkpoints"), "a run writes through none"),
    "a checkpoint": (lambda work: inside(work, "checkpoints/step-0000001"), "a run writes through none"),
    "a file of a checkpoint": (lambda work: inside(work, "checkpoints/step-1/x"), "a run writes through none"),
    "nothing": (lambda work: inside(work, "run.json", target="nowhere"), "a run writes through none"),
}


def inside(work: Path, name: str, target: str = "victim.txt") -> None:
    (work / "out" / name).parent.mkdir(parents=True)
    (work / "out" / name).symlink_to(work.parent / target)


@pytest.mark.parametrize("how", ["--resume", "--overwrite", "--out=out"])
@pytest.mark.parametrize("case", RUNS)
def test_a_run_writes_through_no_link(lora, work, case, how):  # noqa: F811
    change, says = RUNS[case]
    change(work)

    refused(lora, "train", "recipe.yaml", how, folder=work.parent, code=9, says=says)
    assert (work.parent / "victim.txt").read_text() == f"a secret: {CANARY}\n"


GGUFS: dict[str, Case] = {
    "bytes": (file("x.gguf", b"\xff" * 1000), 4, "it is no GGUF file, or damaged"),
    "nothing": (file("x.gguf", b""), 4, "it is no GGUF file, or damaged"),
    "a pickle": (file("x.gguf", DISGUISED), 4, "it is no GGUF file, or damaged"),
    "tensors without end": (file("x.gguf", b"GGUF\x03\0\0\0" + b"\xff" * 7 + b"\x0f" + b"\0" * 8), 4, "damaged"),
    "values without end": (file("x.gguf", b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\xff" * 7 + b"\x0f"), 4, "damaged"),
    "an empty model": (file("x.gguf", b"GGUF\x03\0\0\0" + b"\0" * 16), 4, "GGUF file"),
}


@pytest.mark.parametrize("case", GGUFS)
def test_a_hostile_gguf_file_is_refused(lora, work, case):  # noqa: F811
    change, code, says = GGUFS[case]
    change(work)

    refused(lora, "params", "--model", "x.gguf", folder=work.parent, code=code, says=says)
