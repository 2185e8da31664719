"""Exports for programs that serve adapters: what they would refuse or misread is refused or put right, and proved."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from adapters import answers_of, load, logits_of, write_random
from layers import relative_difference
from peft import PeftModel
from running import write_rows
from tiny import byte_tokenizer, tiny_base

from lora_cli.data.chat_template import rendered
from lora_cli.export.mlx import read_mlx
from lora_cli.export.ollama import Turns, go_template, turns_of
from lora_cli.export.runtimes import RUNTIMES, TRAITS, Subject, findings
from lora_cli.lora.config import LoRAConfig
from lora_cli.lora.peft_format import load_adapter
from lora_cli.lora.weights import CONVOLUTION, EMBEDDING, EXPERTS, LINEAR

PEFT_ASKS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # transformers, under an old name
TWISTS = {"rank_pattern": {r".*\.1\..*": 3}, "alpha_pattern": {".*mlp.*": 5}, "use_rslora": True, "size": 0.1}
AGREE = 2e-6
PLAIN = LoRAConfig(r=8, lora_alpha=16, target_modules=("q_proj",))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("runtimes") / "base")


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_a_folder_for_a_server_is_the_same_adapter_to_peft(lora, base, tmp_path, to):
    out = write_random(tmp_path / "out", base, **TWISTS)
    expected = logits_of(base, load_adapter(out))

    told = lora("export", "--adapter", out, "--to", to, "--base", base, "--out", tmp_path / to, "--json").json

    for one, other in zip(answers_of(PeftModel.from_pretrained(load(base), tmp_path / to)), expected, strict=True):
        assert relative_difference(one, other) < AGREE
    config = json.loads((tmp_path / to / "adapter_config.json").read_text())
    plain = (False, {}, {}) if to == "sglang" else (True, {r".*\.1\..*": 3}, {".*mlp.*": 5})
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == plain
    assert [entry["trait"] for entry in told["findings"]] == (["rslora", "ranks", "scales"] if to == "sglang" else [])
    assert told["proof"]["largest_logit_difference"] < 1e-5
    assert (told["difference"] == 0) is (to == "vllm")


def test_what_a_server_must_be_told_is_in_the_command_that_is_printed(lora, base, tmp_path):
    out = write_random(tmp_path / "out", base, "qv", r=20, lora_alpha=40)

    done = lora("export", "--adapter", out, "--to", "vllm", "--out", tmp_path / "vllm")

    assert done.out.splitlines() == [
        "exported 8 tensors · 20.9 kB · read back and equal, bit for bit",
        "note     a rank above 16: vLLM takes ranks up to 16 unless told otherwise; start it with `--max-lora-rank`",
        f"written  {tmp_path / 'vllm'}",
        f"use      vllm serve {base} --enable-lora --max-lora-rank 32 --lora-modules adapter={tmp_path / 'vllm'}",
    ]


def test_mlx_s_folder_holds_the_same_update_transposed_with_one_rank_and_scale(lora, base, tmp_path):
    out = write_random(tmp_path / "out", base, **TWISTS)

    told = lora("export", "--adapter", out, "--to", "mlx", "--out", tmp_path / "mlx", "--json").json

    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == [
        "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
    ]  # fmt: skip
    assert (config["num_layers"], config["lora_parameters"]["rank"], config["lora_parameters"]["scale"]) == (2, 4, 2.0)
    read = read_mlx(tmp_path / "mlx", load_adapter(out))
    for one, other in zip(logits_of(base, read), logits_of(base, load_adapter(out)), strict=True):
        assert relative_difference(one, other) < AGREE
    assert 0 <= told["difference"] < 1e-7


def test_ollama_gets_a_modelfile_and_the_file_of_llama_cpp(lora, base, tmp_path):
    out = write_random(tmp_path / "out", base)
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_p": None, "do_sample": True}))

    lora("export", "--adapter", out, "--to", "ollama", "--out", tmp_path / "ollama")
    lora("export", "--adapter", out, "--to", "gguf-adapter", "--out", tmp_path / "a.gguf")

    assert (tmp_path / "ollama/adapter.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    assert (tmp_path / "ollama/Modelfile").read_text() == (
        f"FROM {base}\nADAPTER ./adapter.gguf\n"
        'TEMPLATE """{{- range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.7\n'
    )


DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSIDE = (  # as Llama 2: the system message stands inside the first user's
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.index0 == 1 %}{{ messages[0]['content'] }} "
    "{% endif %}{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def test_a_chat_template_with_a_system_message_of_its_own_brings_it_along():
    tokenizer = byte_tokenizer(DEFAULT)

    turns = turns_of(tokenizer)

    assert turns.default == "Be good."
    talk = [{"role": "user", "content": "hello"}]
    assert turns.rendered(talk) == rendered(tokenizer, talk, add_generation_prompt=True)


def test_a_chat_template_that_is_not_message_by_message_is_refused(lora, tmp_path):
    base = tiny_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(INSIDE)
    out = write_random(tmp_path / "out", base)

    done = lora("export", "--adapter", out, "--to", "ollama", "--out", tmp_path / "ollama", code=4)

    assert "its chat template is not message by message" in done.err
    assert not (tmp_path / "ollama").exists()


def test_go_s_template_has_a_case_for_every_role():
    turns = Turns({"user": ("<u>", "</u>"), "assistant": ("<a>", "</a>")}, "<a>")

    assert go_template(turns) == (
        '{{- range .Messages }}{{ if eq .Role "user" }}<u>{{ .Content }}</u>'
        '{{ else if eq .Role "assistant" }}<a>{{ .Content }}</a>{{ end }}{{ end }}<a>'
    )


HAVING = {
    "not_in_llama_cpp": Subject(PLAIN, ["q_proj"], model_type="opt"),
    "not_in_mlx": Subject(PLAIN, ["q_proj"], model_type="gpt2"),
    "not_in_vllm": Subject(PLAIN, ["c_attn"], model_type="gpt2"),
    "no_tables_in_vllm": Subject(PLAIN, ["lm_head"], model_type="qwen2"),
    "biases": Subject(LoRAConfig(r=8, lora_alpha=16, target_modules=(), bias="lora_only"), ["q_proj"]),
    "dora": Subject(LoRAConfig(r=8, lora_alpha=16, target_modules=(), use_dora=True), ["q_proj"]),
    "whole": Subject(PLAIN, ["q_proj"], whole=["embed_tokens"]),
    "whole_heads": Subject(PLAIN, ["q_proj"], whole=["score"]),
    "whole_others": Subject(PLAIN, ["q_proj"], whole=["score", "norm"]),
    "rslora": Subject(LoRAConfig(r=8, lora_alpha=16, target_modules=(), use_rslora=True), ["q_proj"]),
    "ranks": Subject(LoRAConfig(r=8, lora_alpha=16, target_modules=(), rank_pattern={"k": 4}), ["q", "k"]),
    "scales": Subject(LoRAConfig(r=8, lora_alpha=16, target_modules=(), alpha_pattern={"k": 4}), ["q", "k"]),
    "rank_above_16": Subject(LoRAConfig(r=17, lora_alpha=16, target_modules=()), ["q_proj"]),
    "rank_above_512": Subject(LoRAConfig(r=513, lora_alpha=16, target_modules=()), ["q_proj"]),
    "tied_embedding": Subject(PLAIN, ["model.embed_tokens"], kinds=[EMBEDDING], tied=True),
    "positions": Subject(PLAIN, ["transformer.wpe"], kinds=[EMBEDDING]),
    "dora_of_embedding": Subject(replace(PLAIN, use_dora=True), ["model.embed_tokens"], kinds=[EMBEDDING]),
    "embedding": Subject(PLAIN, ["model.embed_tokens"], kinds=[EMBEDDING]),
    "convolution": Subject(PLAIN, ["conv1"], kinds=[LINEAR, CONVOLUTION]),
    "experts": Subject(PLAIN, ["model.layers.0.mlp.experts.gate_up_proj[0]"], kinds=[EXPERTS]),
    "tied_head": Subject(PLAIN, ["lm_head"], tied=True),
}


@pytest.mark.parametrize("trait", TRAITS)
def test_every_trait_is_seen_where_it_is_and_not_where_it_is_not(trait):
    plain = Subject(PLAIN, ["model.layers.0.self_attn.q_proj"], model_type="llama")

    assert TRAITS[trait].has(HAVING[trait])
    assert not TRAITS[trait].has(plain)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_plain_adapter_is_taken_by_every_runtime_as_it_is_and_what_is_refused_has_a_way_out(runtime):
    verdicts = RUNTIMES[runtime].verdicts

    assert not findings(runtime, Subject(PLAIN, ["model.layers.0.self_attn.q_proj"], model_type="llama"))
    assert all(trait in TRAITS and verdict.why for trait, verdict in verdicts.items())
    assert all(verdict.fix for verdict in verdicts.values() if verdict.outcome != "converted")


@pytest.mark.parametrize(
    ("to", "said"), [("vllm", "vLLM: DoRA: vLLM does not load DoRA"), ("sglang", "SGLang: DoRA: ")]
)
def test_what_a_runtime_can_not_serve_is_refused_before_anything_is_written(lora, base, tmp_path, to, said):
    out = write_random(tmp_path / "out", base, use_dora=True)

    done = lora("export", "--adapter", out, "--to", to, "--out", tmp_path / to, code=4)

    assert said in done.err
    assert "fix: train without DoRA, or `lora merge` it and `lora extract` a plain adapter" in done.err
    assert not (tmp_path / to).exists()


@pytest.fixture
def recipe(base, tmp_path):
    def write(**lora) -> Path:
        write_rows(tmp_path / "rows.jsonl")
        settings = {
            "model": {"base": str(base)},
            "lora": {"r": 20, "targets": "qkvo"} | lora,
            "data": {"train": "rows.jsonl"},
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings | {"output": str(tmp_path / "out")}))
        return tmp_path / "r.yaml"

    return write


def test_check_says_before_training_which_runtimes_can_serve_the_adapter(lora, recipe):
    found = lora("check", recipe(use_rslora=True, rank_pattern={"v_proj": 4})).out

    assert "ok    runtimes    vLLM, SGLang, llama.cpp, Ollama, MLX can serve the adapter\n" in found
    found = lora("check", recipe(use_dora=True)).out
    assert (
        "ok    runtimes    MLX can serve the adapter; vLLM can't: DoRA; SGLang can't: DoRA; llama.cpp can't: DoRA; "
        in found
    )


def test_check_for_a_runtime_fails_on_what_it_refuses_and_says_what_the_rest_needs(lora, recipe):
    done = lora("check", recipe(use_dora=True), "--for", "vllm,llama.cpp", code=4)
    assert "fail  runtimes    vLLM: DoRA: vLLM does not load DoRA" in done.out
    assert "fail  runtimes    llama.cpp: DoRA: its update depends on the base's row norms" in done.out
    assert "not ready to train: 2 faults" in done.out

    done = lora("check", recipe(use_rslora=True), "--for", "vLLM, sglang")
    assert (
        "ok    runtimes    vLLM, SGLang can serve the adapter; "
        "vLLM: start it with `--max-lora-rank`, for a rank above 16; "
        "SGLang: as `lora export --to sglang` writes it, for rsLoRA\n"
    ) in done.out


def test_biases_are_told_before_training_too(lora, tmp_path, recipe):
    told = lora(
        "check", recipe(), "--set", f"model.base={tiny_base(tmp_path / 'opt', 'opt')}", "--set", "lora.bias=all"
    )

    assert "vLLM can't: trained biases; SGLang can't: trained biases; " in told.out


def test_an_unknown_runtime_is_refused_with_those_there_are(lora, recipe):
    done = lora("check", recipe(), "--for", "vllm,tgi", code=2)

    assert "`--for` knows no runtime 'tgi'" in done.err
    assert "vllm, sglang, gguf-adapter, ollama, mlx, llama.cpp" in done.err


def test_the_table_of_runtimes_needs_no_torch():
    code = "import sys, lora_cli.export.runtimes; print('torch' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
