"""One process, or several that hold the base whole (DDP) or in shards (FSDP2): the same run, through the command line.

The workers are forked; `tests/cli/test_launch.py` starts some the long way.
"""

import json

import pytest
from running import adapter_bytes, events, lora_workers, resumed_after, weights
from same_run import FIRST_STEP, WHOLE, assert_same_adapter, assert_same_gradients, assert_same_run
from tiny import TOKENS, VOCABULARY, tiny_base
from torch.distributed.tensor import DTensor

from lora_cli.train.sharded import sharded_modules

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
KINDS = {"ddp": {}, "fsdp2": FSDP2}
# With 7 rows a step, one process has a row less than the others
SEVEN = WHOLE | FIRST_STEP | {"training.global_batch_size": 7, "training.micro_batch_size": 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_one(kind, processes, lora, recipe, tmp_path):
    lora("train", recipe(SEVEN), "--out", tmp_path / "one")

    lora_workers(processes, "train", recipe(SEVEN), "--out", tmp_path / "many", **KINDS[kind])

    assert events(tmp_path / "many", "started")[0]["processes"] == processes
    assert_same_gradients(tmp_path / "many", tmp_path / "one")
    assert_same_run(tmp_path / "many", tmp_path / "one")


def test_under_fsdp_every_parameter_is_in_shards_but_for_the_head_while_the_loss_is_made(recipe, tmp_path):
    def report(rank: int) -> None:
        from lora_cli.objectives import sft
        from lora_cli.runs import train

        digest, loss = train.frozen_digest, sft.head_cross_entropy

        def looked_at(model):
            found = {name: p.to_local().numel() for name, p in model.named_parameters() if isinstance(p, DTensor)}
            every = {name: p.numel() for name, p in model.named_parameters()}
            (tmp_path / f"{rank}.json").write_text(json.dumps([found, every, len(sharded_modules(model))]))
            return digest(model)

        def with_head(hidden, head, *rest):
            (tmp_path / f"head {rank}.json").write_text(json.dumps(head.weight.numel()))
            return loss(hidden, head, *rest)

        train.frozen_digest = looked_at  # called before the first step and after the last
        sft.head_cross_entropy = with_head

    lora_workers(2, "train", recipe({"training.max_steps": 1}), "--on", "fsdp2", before=report)

    (first, every, apart), (second, *_) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(every) == 21 + 28
    assert apart == 2 + 1  # each block, and what lies outside of them
    assert {name: first[name] + second[name] for name in first} == every
    assert sum(first.values()) == sum(second.values())
    assert [json.loads((tmp_path / f"head {rank}.json").read_text()) for rank in range(2)] == [
        every["lm_head.weight"]
    ] * 2


@pytest.mark.parametrize(
    "settings",
    [
        {"model.dtype": "bfloat16", "training.sample_prompts": ["what"]},
        {"model.dtype": "bfloat16", "model.quantize": "nf4"},
        {"model.quantize": "nf4", "lora.use_dora": True},
        {"lora.init": "pissa", "lora.use_dora": True, "lora.use_rslora": True},
        {"lora.modules_to_save": ["lm_head", "embed_tokens"], "lora.init": "olora"},
        {"lora.trainable_tokens": ["<s>", "<|im_end|>"], "lora.freeze_A": True, "lora.init": "eva"},
        {"training.gradient_checkpointing": True, "data.packing": False, "training.sample_prompts": ["what"]},
    ],
    ids=["bf16", "nf4", "nf4 dora", "pissa dora", "trained whole", "tokens, frozen A, EVA", "recomputed"],
)
def test_in_shards_or_whole_the_run_is_the_same(settings, recipe, tmp_path):
    settings = WHOLE | {"training.micro_batch_size": 2} | settings
    if "model.quantize" in settings:
        import bitsandbytes  # noqa: F401  once, not in every worker
    for kind, environment in KINDS.items():
        lora_workers(2, "train", recipe(settings), "--out", tmp_path / kind, **environment)

    assert_same_run(tmp_path / "fsdp2", tmp_path / "ddp")
    assert events(tmp_path / "fsdp2", "sampled") == events(tmp_path / "ddp", "sampled")


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gemma3", "opt"])
def test_every_architecture_is_sharded_as_it_is(name, lora, recipe, tmp_path):
    """All steps as with the base whole on both; with one process the first, for Adam magnifies that sums are cut otherwise."""
    file = recipe(WHOLE | FIRST_STEP, base=tiny_base(tmp_path / "base", name))
    lora("train", file, "--out", tmp_path / "one", "--set", "training.max_steps=1")

    for kind, environment in KINDS.items():
        lora_workers(2, "train", file, "--out", tmp_path / kind, **environment)

    assert_same_gradients(tmp_path / "fsdp2", tmp_path / "one")
    assert_same_run(tmp_path / "fsdp2", tmp_path / "ddp")


WEIGHTS = {
    "experts": ("mixtral", ["experts.gate_up_proj", "experts.down_proj", "q_proj"]),
    "table and tied head": ("llama-tied", ["embed_tokens", "lm_head", "v_proj"]),
    "positions": ("gpt2", ["wpe", "c_attn"]),
}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_kind_of_weight_is_sharded(weight, lora, recipe, tmp_path):
    name, targets = WEIGHTS[weight]
    short = {"lora.targets": targets, "training.max_steps": 1}
    file = recipe(WHOLE | FIRST_STEP | short, base=tiny_base(tmp_path / "base", name))
    lora("train", file, "--out", tmp_path / "one")

    lora_workers(2, "train", file, "--out", tmp_path / "two", **FSDP2)

    assert_same_gradients(tmp_path / "two", tmp_path / "one")
    assert_same_adapter(tmp_path / "two", tmp_path / "one")


NEW = ["<question>", *(f"<tag-{i}>" for i in range(VOCABULARY - TOKENS))]  # the last has no row in the base's tables


@pytest.mark.parametrize(("kind", "name"), [("ddp", "llama"), ("fsdp2", "llama"), ("fsdp2", "llama-tied")])
def test_longer_tables_are_trained_alike(kind, name, lora, recipe, tmp_path):
    """Their new rows start at the mean of the others, which in shards no process has whole."""
    short = {"lora.new_tokens": NEW, "lora.trainable_tokens": ["<s>"], "training.max_steps": 1}
    file = recipe(WHOLE | FIRST_STEP | short, base=tiny_base(tmp_path / "base", name))
    rows = [{"prompt": f"{NEW[0]}what is {i}?{NEW[-1]}", "completion": f"{NEW[1]} the cat{NEW[-1]}"} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora("train", file, "--out", tmp_path / "one")

    lora_workers(2, "train", file, "--out", tmp_path / "two", **KINDS[kind])

    assert_same_gradients(tmp_path / "two", tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one", steps=1)
    assert (
        adapter_bytes(tmp_path / "two")["adapter_config.json"] == adapter_bytes(tmp_path / "one")["adapter_config.json"]
    )
    rows = [len(tensor) for name, tensor in weights(tmp_path / "two").items() if "token_adapter" in name]
    assert rows
    assert {*rows} == {len(NEW) + 1}


@pytest.mark.parametrize(
    "also", [{}, {"lora.init": "pissa"}, {"lora.modules_to_save": ["lm_head"]}], ids=["plain", "pissa", "trained whole"]
)
@pytest.mark.parametrize(("first", "then"), [(None, "fsdp2"), ("fsdp2", None), ("ddp", "fsdp2")])
def test_a_run_is_continued_on_any_number_of_devices(first, then, also, lora, recipe, tmp_path):
    settings = WHOLE | {"training.save_steps": 2, "training.keep_checkpoints": 9} | also
    lora("train", recipe(settings), "--out", tmp_path / "straight")

    def train(kind: str | None, *arguments: object) -> None:
        if kind is None:
            lora(*arguments)
        else:
            lora_workers(2, *arguments, **KINDS[kind])

    train(first, "train", recipe(settings), "--out", tmp_path / "moved")
    other_number = () if first and then else ("--allow-change", "processes")
    resumed_after(
        2,
        tmp_path / "moved",
        recipe(settings),
        lambda *rest: train(then, *rest),
        *("--out", tmp_path / "moved", *other_number),
    )

    assert [event["step"] for event in events(tmp_path / "moved", "started")] == [0, 2]
    assert_same_adapter(tmp_path / "moved", tmp_path / "straight")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.quantize": "int8"}, "`model.quantize: int8` can't be sharded"),
        ({"training.optimizer": "adamw_8bit"}, "`training.optimizer: adamw_8bit` can't be sharded"),
    ],
    ids=["int8", "8bit"],
)
def test_what_needs_whole_parameters_is_refused_under_fsdp(settings, said, recipe):
    for done in lora_workers(2, "train", recipe(settings), code=2, **FSDP2):
        assert said in done.err


def test_blocks_that_the_model_does_not_have_are_an_error_that_names_those_it_has(recipe):
    wrong = FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}

    for done in lora_workers(2, "train", recipe(), code=4, **wrong):
        assert "FSDP finds no transformer blocks in LlamaForCausalLM: it looks for BertLayer\n" in done.err
        assert "the model has LlamaDecoderLayer" in done.err


def test_a_process_by_itself_shards_nothing(lora, recipe, tmp_path, monkeypatch):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)

    lora("train", recipe({"training.optimizer": "adamw_8bit"}))

    assert events(tmp_path / "out", "finished")
