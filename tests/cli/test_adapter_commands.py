"""Adapters as values on the command line: compose, extract, resize, inspect and diff, as a person runs them."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
import yaml
from adapters import ROWS, answers_of, load, logits_of, random_adapter, updates, write_random
from layers import relative_difference
from peft import PeftModel
from running import hashes, write_recipe, write_rows
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, swapped_tokenizer, tiny_base
from tokenizers import normalizers

from lora_cli.cli.compose import percent
from lora_cli.lora.algebra import spectra
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.models.identity import tokenizer_identity
from lora_cli.models.load import load_model
from lora_cli.recipe.reader import read_recipe
from lora_cli.runs import evaluate

PEFT_ASKS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # transformers, under an old name
AGREE = 2e-6


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: tiny_base(tmp_path_factory.mktemp(name) / "base", name) for name in ("llama", "gpt2", "llama-tied")}


@pytest.fixture
def pair(bases, tmp_path):
    """pair("gpt2") -> (base, A, B): two adapters on disk that differ in all that may differ."""

    def write(name="llama"):
        base = bases[name]
        a = write_random(tmp_path / "a", base, rank_pattern={r".*\.1\..*": 3}, alpha_pattern={r".*\.1\..*": 5})
        return base, a, write_random(tmp_path / "b", base, "o", r=7, use_rslora=True, seed=2)

    return write


def assert_same_answers(got, expected, tolerance: float = AGREE) -> None:
    for one, other in zip(got, expected, strict=True):
        assert relative_difference(one, other) <= tolerance


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_composed_adapter_is_a_plain_one_for_us_and_for_peft(lora, pair, tmp_path, name):
    base, a, b = pair(name)
    before = hashes(a) | hashes(b)

    done = lora("compose", a, b, "--weights", "0.7,-0.3", "--out", tmp_path / "ab")

    assert hashes(a) | hashes(b) == before
    assert f"composed 0.7 × {a} + -0.3 × {b} · linear" in done.out
    assert "error    none: the result is exact to rounding" in done.out
    adapter = load_adapter(tmp_path / "ab")
    by_hand = {path: 0.7 * update for path, update in updates(load_adapter(a)).items()}
    for path, update in updates(load_adapter(b)).items():
        by_hand[path] = by_hand[path] - 0.3 * update
    assert all(relative_difference(found, by_hand[path]) < 1e-6 for path, found in updates(adapter).items())
    assert_same_answers(answers_of(PeftModel.from_pretrained(load(base), tmp_path / "ab")), logits_of(base, adapter))


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_doras_are_composed_and_resized_beside_their_base_and_peft_reads_them(lora, bases, tmp_path, name):
    base = bases[name]
    a = write_random(tmp_path / "a", base, use_dora=True, r=6)
    b = write_random(tmp_path / "b", base, "o", use_rslora=True, seed=2)
    ask = ("compose", a, b, "--weights", "0.6,-0.5", "--out", tmp_path / "ab")

    refused = lora(*ask, code=4)
    composed = lora(*ask, "--base", base)
    resized = lora("resize", tmp_path / "ab", "--r", 3, "--base", base, "--out", tmp_path / "small", "--json").json

    assert "a DoRA scales the rows of the base" in refused.err
    assert "fix: give the base with `--base`" in refused.err
    assert "error    none: the result is exact to rounding" in composed.out
    assert "a DoRA in PEFT's format, read back equal" in composed.out
    assert 0 < resized["error"] < 1
    for folder in ("ab", "small"):
        theirs = answers_of(PeftModel.from_pretrained(load(base), tmp_path / folder))
        assert_same_answers(theirs, logits_of(base, load_adapter(tmp_path / folder)), 5e-6)


def test_a_composed_adapter_says_where_it_comes_from_and_keeps_the_base(lora, pair, tmp_path):
    _, a, b = pair()

    found = lora("compose", a, b, "--method", "dare", "--r", 5, "--seed", 3, "--out", tmp_path / "ab", "--json").json

    adapter, parents = load_adapter(tmp_path / "ab"), [load_adapter(a), load_adapter(b)]
    assert adapter.base == parents[0].base
    assert adapter.origin == found["origin"]
    assert adapter.origin["command"] == "compose"
    assert [adapter.origin[key] for key in ("method", "r", "density", "seed")] == ["dare", 5, 0.5, 3]
    assert adapter.origin["parents"] == [
        {"sha256": parent.digest(), "name": folder.name, "weight": 1.0}
        for parent, folder in zip(parents, (a, b), strict=True)
    ]
    assert 0 < found["error"] < 1
    assert found["sha256"] == adapter.digest()
    assert "by lora compose (dare) from 1.0 × a, 1.0 × b" in lora("inspect", tmp_path / "ab").out


def test_dare_is_the_same_bytes_for_a_seed(lora, pair, tmp_path):
    _, a, b = pair()
    for out, seed in (("x", 1), ("y", 1), ("z", 2)):
        lora("compose", a, b, "--method", "dare", "--seed", seed, "--out", tmp_path / out)

    x, y, z = (hashes(tmp_path / out) for out in "xyz")

    assert x == y
    assert x != z


def test_what_cancels_is_exit_6_and_writes_nothing(lora, pair, tmp_path):
    base, a, _ = pair()

    done = lora("compose", a, a, "--weights", "1,-1", "--out", tmp_path / "none", code=6)
    d = write_random(tmp_path / "d", base, "q", use_dora=True)
    dora = lora("compose", d, d, "--weights", "1,-1", "--base", base, "--out", tmp_path / "none", code=6)

    assert "with these weights the adapters cancel: the sum does nothing" in done.err
    assert "with these weights the adapters cancel: the sum does nothing" in dora.err
    assert not (tmp_path / "none").exists()


def test_adapters_of_another_base_are_refused_unless_it_is_allowed(lora, pair, tmp_path, bases):
    _, a, _ = pair()
    elsewhere = tiny_base(tmp_path / "elsewhere", "llama", seed=1)
    other = write_random(tmp_path / "other", elsewhere)

    done = lora("compose", a, other, "--out", tmp_path / "x", code=4)
    lora("compose", a, other, "--out", tmp_path / "y", "--allow-base-mismatch")

    assert re.search(r"other was trained on another base than .*a: they differ in lm_head.weight", done.err)
    assert not (tmp_path / "x").exists()
    adapter = load_adapter(tmp_path / "y")
    assert adapter.origin["allow_base_mismatch"][0] == "lm_head.weight"
    assert adapter.base == load_adapter(a).base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1"], "`--weights` has 1 numbers for 2 adapters"),
        (["--weights", "1,x"], "`--weights 1,x` is no list of numbers"),
        (["--weights", "1,inf"], "`--weights 1,inf` is no list of numbers"),
        (["--density", "0.5"], "`--method linear` keeps every entry: it has no `--density`"),
        (["--method", "ties", "--density", "0"], "`--density 0` keeps nothing"),
    ],
)
def test_what_does_not_go_together_is_exit_2(lora, pair, tmp_path, arguments, message):
    _, a, b = pair()

    done = lora("compose", a, b, "--out", tmp_path / "x", *arguments, code=2)

    assert message in done.err


def test_an_output_that_exists_is_left_alone(lora, pair):
    base, a, b = pair()
    before = hashes(b)

    for command in (["compose", a, b], ["resize", a, "--r", 2], ["extract", "--base", base, "--tuned", base, "--r", 1]):
        assert "the output exists already" in lora(*command, "--out", b, code=5).err

    assert hashes(b) == before


def tuned(base, out, *, change) -> None:
    """A copy of the base, in several shards, after change(name, parameter)."""
    model = load(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    model.save_pretrained(out, max_shard_size="30KB")


def noise(name, parameter) -> None:
    parameter.add_(0.02 * torch.randn(parameter.shape))


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-tied"])
def test_extract_gives_back_the_adapter_that_was_merged(lora, bases, tmp_path, name):
    a = write_random(tmp_path / "a", bases[name], r=4, rank_pattern={r".*\.1\..*": 2})
    lora("merge", "--adapter", a, "--dtype", "float32")

    found = lora("extract", "--base", bases[name], "--tuned", a / "merged", "--r", 4, "--out", tmp_path / "x", "--json")

    assert found.json["error"] < 1e-5
    assert found.json["left_out"] == []
    expected = updates(load_adapter(a))
    got = updates(load_adapter(tmp_path / "x"))
    assert got.keys() == expected.keys()
    assert all(relative_difference(got[path], expected[path]) < 1e-5 for path in expected)
    assert_same_answers(
        logits_of(bases[name], load_adapter(tmp_path / "x")), logits_of(bases[name], load_adapter(a)), 1e-5
    )


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_extract_misses_no_more_than_any_adapter_of_its_rank_must(lora, bases, tmp_path, name):
    tuned(bases[name], tmp_path / "tuned", change=noise)

    found = lora(
        "extract", "--base", bases[name], "--tuned", tmp_path / "tuned", "--r", 5, "--out", tmp_path / "x", "--json"
    ).json

    first, second = load(bases[name]), load(tmp_path / "tuned")
    for path, module in found["modules"].items():
        S = torch.linalg.svdvals((second.get_submodule(path).weight - first.get_submodule(path).weight).double())
        assert module["r"] == 5
        assert module["norm"] == pytest.approx(S.norm().item(), rel=1e-5)
        assert module["error"] == pytest.approx((S[5:].norm() / S.norm()).item(), rel=1e-4)
    adapter = load_adapter(tmp_path / "x")
    assert_same_answers(answers_of(PeftModel.from_pretrained(first, tmp_path / "x")), logits_of(bases[name], adapter))


def test_extract_measures_and_names_what_it_can_not_hold(lora, bases, tmp_path):
    def change(name, parameter):
        if name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
            parameter.mul_(1.5)

    tuned(bases["llama"], tmp_path / "tuned", change=change)
    ask = ("extract", "--base", bases["llama"], "--tuned", tmp_path / "tuned", "--energy", 0.9, "--out")

    found = lora(*ask, tmp_path / "x", "--json").json

    assert list(found["modules"]) == ["model.layers.0.self_attn.q_proj"]
    assert found["error"] <= 0.1**0.5
    assert found["unchanged"] == 13
    left = {tensor["name"]: tensor["relative"] for tensor in found["left_out"]}
    assert left == pytest.approx({"model.norm.weight": 0.5, "model.embed_tokens.weight": 0.5}, rel=1e-6)
    text = lora(*ask, tmp_path / "y").out
    assert "left out 2 tensors that changed and that this adapter does not hold" in text
    assert "13 of the chosen weights are the same in both" in text


def test_a_tied_head_can_be_extracted_and_its_embedding_is_named(lora, bases, tmp_path):
    tuned(bases["llama-tied"], tmp_path / "tuned", change=lambda name, p: p.mul_(2) if "embed" in name else None)

    found = lora(
        "extract", "--base", bases["llama-tied"], "--tuned", tmp_path / "tuned", "--targets", "lm_head,q_proj",
        "--r", 32, "--out", tmp_path / "x", "--json",
    ).json  # fmt: skip

    assert list(found["modules"]) == ["lm_head"]
    assert [tensor["name"] for tensor in found["left_out"]] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("tuned_as", "message"),
    [
        ("llama", "the two models are the same"),
        ("gpt2", "the base is a llama model and the tuned one a gpt2"),
        ("narrower", "model.layers.0.mlp.gate_proj is [48, 32] in the base and [40, 32] in the tuned model"),
        (
            "normed",
            "none of the chosen weights has changed; what has is nothing that an adapter can hold: model.norm.weight",
        ),
    ],
)
def test_models_that_are_no_pair_are_exit_4(lora, bases, tmp_path, tuned_as, message):
    folder = bases.get(tuned_as, tmp_path / "tuned")
    if tuned_as == "normed":
        tuned(bases["llama"], folder, change=lambda name, p: p.mul_(2) if name == "model.norm.weight" else None)
    elif tuned_as == "narrower":
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(bases["llama"], intermediate_size=40)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)

    done = lora("extract", "--base", bases["llama"], "--tuned", folder, "--r", 2, "--out", tmp_path / "x", code=4)

    assert message in done.err
    assert not (tmp_path / "x").exists()


def test_values_that_are_not_finite_are_no_update(lora, bases, tmp_path):
    tuned(bases["llama"], tmp_path / "tuned", change=lambda name, p: p.fill_(torch.nan) if "q_proj" in name else None)

    done = lora(
        "extract", "--base", bases["llama"], "--tuned", tmp_path / "tuned", "--r", 2, "--out", tmp_path / "x", code=6
    )

    assert "model.layers.0.self_attn.q_proj has values that are not finite in one of the models" in done.err


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        (["--r", "2"], lambda adapter: {len(f.A) for f in adapter.layers.values()} == {2}),
        (["--energy", "0.7"], lambda adapter: 1 < adapter.parameters < 4000),
        (["--budget", "2K"], lambda adapter: 1900 < adapter.parameters <= 2000),
        (["--budget", "8kB"], lambda adapter: 1900 < adapter.parameters <= 2000),
    ],
)
def test_resize_cuts_by_rank_energy_or_budget(lora, pair, tmp_path, arguments, fits):
    base, a, _ = pair()

    found = lora("resize", a, *arguments, "--out", tmp_path / "small", "--json").json
    text = lora("resize", a, *arguments, "--out", tmp_path / "again", "--modules").out

    small, whole = load_adapter(tmp_path / "small"), load_adapter(a)
    assert fits(small)
    assert small.origin["parents"] == [{"sha256": whole.digest(), "name": "a"}]
    missed = sum((e - g).square().sum() for e, g in zip(updates(whole).values(), updates(small).values(), strict=True))
    norm = sum(update.square().sum() for update in updates(whole).values())
    assert found["error"] == pytest.approx(float((missed / norm) ** 0.5), rel=1e-4)
    for path, module in found["modules"].items():
        missed = (updates(whole)[path] - updates(small)[path]).norm() / updates(whole)[path].norm()
        assert module["error"] == pytest.approx(missed.item(), rel=1e-3, abs=1e-6)
        assert re.search(rf"^{re.escape(path)} .* {re.escape(percent(module['error']))} ", text, re.MULTILINE)
    logits_of(base, small)


def test_resize_takes_one_way_to_choose(lora, pair, tmp_path):
    _, a, _ = pair()

    for arguments in ([], ["--r", 2, "--energy", 0.5]):
        assert "give one of `--r`, `--energy`, `--budget`" in lora("resize", a, *arguments, "--out", "x", code=2).err


def test_inspect_measures_the_updates_against_the_base(lora, pair):
    base, a, _ = pair("gpt2")

    found = lora("inspect", a, "--base", base, "--json").json

    model = load(base)
    for module, (path, update) in zip(found["modules"], updates(load_adapter(a)).items(), strict=True):
        W = model.get_submodule(path).weight.double()
        S = torch.linalg.svdvals(update)
        p = S[S > 1e-9] / S.sum()
        assert module["path"] == path
        assert module["norm"] == pytest.approx(S.norm().item(), rel=1e-4)
        assert module["relative"] == pytest.approx((S.norm() / W.norm()).item(), rel=1e-4)
        assert module["effective_rank"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-4)
        assert module["energy_rank"] == 1 + int((S.square().cumsum(0) < 0.9 * S.square().sum()).sum())


def test_inspect_finds_the_directions_that_the_base_does_not_have(lora, tmp_path):
    """A base whose weights reach half of the outputs, and an update that writes to the other half."""
    base = tiny_base(tmp_path / "base", "llama")
    file = base / "model.safetensors"
    tensors = load_file(file)
    weight = "model.layers.0.self_attn.q_proj.weight"
    U, S, Vt = torch.linalg.svd(tensors[weight])
    tensors[weight] = (U[:, :16] * S[:16]) @ Vt[:16]
    save_file(tensors, file, {"format": "pt"})
    a = write_random(tmp_path / "a", base, "q", r=3, layers=[0])
    tensors = load_file(a / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors[name.format("B")], tensors[name.format("A")] = 5 * U[:, 16:19].contiguous(), Vt[:3].contiguous()
    metadata = {"format": "pt"}
    save_file(tensors, a / "adapter_model.safetensors", metadata)
    loud = lora("inspect", a, "--base", base, "--intruders", "--json").json["modules"][0]["intruders"]
    tensors[name.format("B")] = 5 * U[:, :3].contiguous()
    save_file(tensors, a / "adapter_model.safetensors", metadata)
    quiet = lora("inspect", a, "--base", base, "--intruders", "--json").json["modules"][0]["intruders"]

    assert (loud, quiet) == (3, 0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_intruders_are_counted_as_the_papers_algorithm_counts_them(lora, bases, tmp_path, name):
    """Shuttleworth et al. 2024, algorithm 1, by plain decompositions of both weights."""
    a = write_random(tmp_path / "a", bases[name], size=0.004)

    found = lora("inspect", a, "--base", bases[name], "--intruders", "--json").json["modules"]

    model, counts = load(bases[name]), []
    for module, update in zip(found, updates(load_adapter(a)).values(), strict=True):
        W = model.get_submodule(module["path"]).weight.detach().double()
        W = W.T if name == "gpt2" else W
        before, after = (torch.linalg.svd(M, full_matrices=False).U for M in (W, W + update))
        cosines = (before.T @ after[:, :10]).abs().amax(0)
        counts.append(int((cosines < 0.5).sum()))
    assert [module["intruders"] for module in found] == counts
    assert 0 < sum(counts) < 10 * len(counts)


def test_inspect_names_dead_modules_and_the_ranks_that_would_do(lora, pair, tmp_path):
    _, a, _ = pair()
    file = a / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "q_proj.lora_B" in name:
            tensors[name].zero_()
        elif "v_proj.lora_B" in name:
            tensors[name][:, 1:] *= 1e-3
    save_file(tensors, file, {"format": "pt"})

    text = lora("inspect", a).out

    assert "dead     2 modules change nothing: model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj" in text
    assert "rank     90 % of every ‖ΔW‖² fits in less, at the same scale; in a recipe:" in text
    assert re.search(r"rank_pattern: \{.*v_proj: 1", text)
    assert "q_proj:" not in text
    assert json.loads(lora("inspect", a, "--json").out)["dead"][0] == "model.layers.0.self_attn.q_proj"


def test_of_what_is_dead_all_over_no_rank_is_suggested_and_no_directions_compared(lora, pair):
    _, a, b = pair()
    file = a / "adapter_model.safetensors"
    save_file({name: W * ("lora_A" in name) for name, W in load_file(file).items()}, file, {"format": "pt"})

    done = lora("inspect", a)

    assert "dead     14 modules change nothing" in done.out
    assert "rank     90 %" not in done.out
    assert lora("inspect", a, "--json").json["suggested"] is None
    assert "one of them changes nothing, and so has no directions" in lora("diff", a, b, "--picture", a / "x.svg").out
    assert (a / "x.svg").is_file()


SUGGESTED = {
    "llama": ("all-linear", {"alpha_pattern": {"v_proj": 3}}),
    "gpt2": ("all-linear", {"use_rslora": True}),
    "mixtral": (["q_proj", "experts.gate_up_proj", "experts.down_proj"], {}),
}


@pytest.mark.parametrize("name", SUGGESTED)
def test_the_suggested_ranks_can_be_pasted_into_a_recipe_and_keep_what_they_say(lora, name, tmp_path):
    base, (targets, settings) = tiny_base(tmp_path / "base", name), SUGGESTED[name]
    a = write_random(tmp_path / "a", base, targets, r=8, **settings)
    file = a / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "v_proj.lora_B" in name or "c_attn.lora_B" in name:
            tensors[name][:, 2:] *= 1e-3
    save_file(tensors, file, {"format": "pt"})
    adapter = load_adapter(a)

    found = lora("inspect", a)
    pasted = yaml.safe_load(found.out[found.out.index("lora:\n") :])
    listed = {f"lora.{key}": value for key, value in pasted["lora"].items()}
    settings = {"lora.targets": list(adapter.config.target_modules + adapter.config.target_parameters)}
    settings |= {"lora.use_rslora": adapter.config.use_rslora} | listed
    recipe = write_recipe(tmp_path, base, settings)
    lora("check", recipe)

    config = read_recipe(recipe).recipe.lora.config(adapter.config.target_modules)
    for path, svd in spectra(adapter).items():
        assert svd.rank_of_energy(0.9) <= config.at(path).r < 8
        assert config.at(path).scale == pytest.approx(adapter.config.at(path).scale, rel=1e-5)


def test_inspect_refuses_another_base_by_name(lora, pair, tmp_path):
    _, a, _ = pair()
    elsewhere = tiny_base(tmp_path / "elsewhere", "llama", seed=1)

    assert (
        "the adapter was trained on another base: they differ in lm_head.weight"
        in lora("inspect", a, "--base", elsewhere, code=4).err
    )
    assert "`--intruders` compares with the base" in lora("inspect", a, "--intruders", code=2).err


def test_diff_of_an_adapter_with_itself_is_nothing_and_with_its_negative_everything(lora, pair, tmp_path):
    _, a, _ = pair()
    lora("compose", a, "--weights", "-1", "--out", tmp_path / "minus")

    same, opposite = lora("diff", a, a, "--json").json, lora("diff", a, tmp_path / "minus", "--json").json

    assert same["config"] == {}
    assert same["same_base"] is True
    for module, negative in zip(same["modules"], opposite["modules"], strict=True):
        assert module["relative"] == pytest.approx(0, abs=1e-6)
        assert module["cosine"] == pytest.approx(1)
        assert negative["relative"] == pytest.approx(2)
        assert negative["cosine"] == pytest.approx(-1)
        for overlap in (module["overlap"], negative["overlap"]):
            assert [overlap[i][i] for i in range(len(overlap))] == pytest.approx([1.0] * len(overlap))


@pytest.mark.parametrize("side", ["input", "output"])
def test_diff_is_the_papers_overlap_and_the_plain_cosine(lora, pair, side):
    _, a, b = pair()

    found = lora("diff", a, b, "--side", side, "--json").json

    one, other = updates(load_adapter(a)), updates(load_adapter(b))
    assert found["only_in_b"] == []
    assert found["only_in_a"] == [path for path in one if path not in other]
    assert found["config"]["use_rslora"] == [False, True]
    for module in found["modules"]:
        first, second = one[module["path"]], other[module["path"]]
        assert module["relative"] == pytest.approx(((first - second).norm() / first.norm()).item(), rel=1e-5)
        cosine = (first * second).sum() / first.norm() / second.norm()
        assert module["cosine"] == pytest.approx(cosine.item(), abs=1e-6)
        V, V2 = (torch.linalg.svd(update if side == "input" else update.T).Vh for update in (first, second))
        for i, j in ((1, 1), (2, 5), (3, 7), (3, 2)):
            phi = (V[:i] @ V2[:j].T).square().sum() / min(i, j)
            assert module["overlap"][i - 1][j - 1] == pytest.approx(phi.item(), abs=1e-6)


def test_diff_names_the_tensors_and_the_tokenizers_parts_in_which_the_adapters_differ(lora, pair, tmp_path):
    _, a, _ = pair()
    theirs = [tokenizer_identity(tokenizer) for tokenizer in (byte_tokenizer(), byte_tokenizer("{{ messages }}"))]
    other = random_adapter(tiny_base(tmp_path / "elsewhere", seed=1), seed=4)
    for folder, adapter, tokenizer in ((a, load_adapter(a), theirs[0]), (tmp_path / "b", other, theirs[1])):
        save_adapter(replace(adapter, tokenizer=tokenizer), folder)

    text, found = lora("diff", a, tmp_path / "b").out, lora("diff", a, tmp_path / "b", "--json").json

    assert "trained on DIFFERENT bases: they differ in lm_head.weight, model.embed_tokens.weight, " in text
    assert "trained with DIFFERENT tokenizers: they differ in template" in text
    assert found["base_differences"][0] == "lm_head.weight"
    assert found["tokenizer_differences"] == ["template"]
    assert lora("diff", a, a, "--json").json["base_differences"] == []


def test_adapters_of_other_tokenizers_are_not_composed_and_those_of_other_templates_with_a_notice(lora, pair, tmp_path):
    _, a, b = pair()
    plain = byte_tokenizer()
    lowered = byte_tokenizer()
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    for n, tokenizer in enumerate((swapped_tokenizer(), lowered, byte_tokenizer("{{ messages }}"))):
        for folder, other in ((a, plain), (b, tokenizer)):
            save_adapter(replace(load_adapter(folder), tokenizer=tokenizer_identity(other)), folder)

        done = lora("compose", a, b, "--out", tmp_path / str(n), code=4 if n < 2 else 0)

        said = "were trained with tokenizers of other ids" if n < 2 else "were trained with another template"
        assert said in done.err


def test_diff_draws_the_overlap(lora, pair, tmp_path):
    _, a, b = pair()

    text = lora("diff", a, b, "--module", "o_proj", "--picture", tmp_path / "overlap.svg").out

    assert re.search(r"^ +1 +[ ░▒▓█]", text, re.MULTILINE)
    drawn = ElementTree.parse(tmp_path / "overlap.svg").getroot()
    cells = list(drawn.iter("{http://www.w3.org/2000/svg}title"))
    assert len(cells) == 2 * 4 * 7  # A has up to 4 directions, B has 7: theirs, and those of random ones
    assert cells[-1].text == f"φ(i=4, j=7) = {7 / 32:.3f}"
    assert "the output exists already" in lora("diff", a, b, "--picture", tmp_path / "overlap.svg", code=5).err
    lora("diff", a, b, "--picture", tmp_path / "new" / "overlap.svg")
    assert (tmp_path / "new" / "overlap.svg").is_file()
    (tmp_path / "file").touch()
    lora("diff", a, b, "--picture", tmp_path / "file" / "overlap.svg", code=5)
    assert "no .svg file" in lora("diff", a, b, "--picture", "x.png", code=2).err
    assert "no module 'nope' in both adapters" in lora("diff", a, b, "--module", "nope", code=4).err


def test_base_and_adapters_answer_side_by_side_in_one_load(lora, pair, tmp_path, monkeypatch):
    _, a, b = pair()
    loads = []

    def counted(*args, **kwargs):
        loads.append(1)
        return load_model(*args, **kwargs)

    monkeypatch.setattr(evaluate, "load_model", counted)
    rows = write_rows(tmp_path / "rows.jsonl")
    lora("compose", a, b, "--weights", "1,0.5", "--out", tmp_path / "ab")
    ask = ("eval", "--data", rows, "--json")

    together = lora(*ask, *(x for folder in (a, tmp_path / "ab", b) for x in ("--adapter", folder))).json

    assert list(together["adapters"]) == [str(a), str(tmp_path / "ab"), str(b)]
    for folder, found in together["adapters"].items():
        alone = lora(*ask, "--adapter", folder).json
        assert alone["adapter"] == found
        assert alone["base"] == together["base"]
    losses = [found["loss"] for found in (together["base"], *together["adapters"].values())]
    assert len(set(losses)) == 4
    assert loads == [1, 1, 1, 1]


def test_generate_asks_every_adapter(lora, pair, tmp_path):
    _, a, b = pair()
    prompts = ("--prompt", "what is", "--max-new-tokens", 4)

    together = lora("generate", "--adapter", a, "--adapter", b, *prompts, "--json").json["what is"]

    assert list(together) == ["base", str(a), str(b)]
    for folder in (a, b):
        alone = lora("generate", "--adapter", folder, *prompts, "--json").json["what is"]
        assert alone == {"base": together["base"], "adapter": together[str(folder)]}


def bend(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


BENT = {
    "compiled": lambda name: name.replace("layers.", "_orig_mod.layers."),
    "fsdp": lambda name: name.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "recomputed": lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    "ddp": lambda name: "module." + name,
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "adapter's name": lambda name: name.replace("lora_A.", "lora_A.default."),
    "all": lambda name: "module._orig_mod." + name.removeprefix("base_model.model.").replace("_B.", "_B.default."),
}


@pytest.mark.parametrize("bent", BENT.values(), ids=BENT)
def test_names_that_wrappers_bent_are_put_right_with_a_notice(lora, pair, bent):
    base, a, _ = pair()
    whole = load_adapter(a)
    bend(a, bent)

    done = lora("inspect", a)

    assert "names put right, such as" in done.err
    assert load_adapter(a).digest() == whole.digest()
    assert_same_answers(logits_of(base, load_adapter(a)), logits_of(base, whole), 0)


def test_two_names_of_one_factor_are_refused(lora, pair):
    _, a, _ = pair()
    file = a / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {"module." + name: tensors[name] + 1}, file, {"format": "pt"})

    assert "several tensors stand for one factor" in lora("inspect", a, code=4).err


@pytest.mark.parametrize("command", ["merge", "eval", "generate"])
def test_a_half_empty_adapter_is_refused(lora, pair, tmp_path, command):
    _, a, _ = pair()
    file = a / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if ".layers.1.self_attn.v_proj" not in name}
    save_file(kept, file, {"format": "pt"})
    more = {"merge": [], "eval": ["--data", write_rows(tmp_path / "rows.jsonl")], "generate": ["--prompt", "x"]}

    done = lora(command, "--adapter", a, *more[command], code=4)

    assert (
        "the adapter is not whole: its config names 14 modules of this base, and 1 of them have no factors, first "
        "model.layers.1.self_attn.v_proj" in done.err
    )


@pytest.mark.filterwarnings(PEFT_ASKS)
def test_a_peft_adapter_that_chose_its_layers_is_whole(bases, tmp_path):
    """`layers_to_transform` and patterns name fewer modules than the names in `target_modules` say."""
    from peft import LoraConfig, get_peft_model

    for n, settings in enumerate(
        [{"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"target_modules": r".*\.0\.mlp\.up_proj"}]
    ):
        get_peft_model(load(bases["llama"]), LoraConfig(**settings)).save_pretrained(tmp_path / str(n))
        adapter = load_adapter(tmp_path / str(n))
        adapter.check_fits(load(bases["llama"]))
        assert adapter.config.target_modules == tuple(adapter.layers)


def test_random_adapters_of_tests_act(bases):
    """What every comparison above leans on."""
    plain = logits_of(bases["llama"])
    assert relative_difference(logits_of(bases["llama"], random_adapter(bases["llama"]))[0], plain[0]) > 1e-2
    assert len(ROWS) == len(plain)
