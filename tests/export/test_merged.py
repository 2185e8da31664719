import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensor_memory import TensorMemory
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_cli.errors import DivergedError, ModelError, SafetyError, StorageError
from lora_cli.export.merged import merge
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.lora.base_files import stored_tensors

CASES = {
    "llama": ("llama", "all-linear", {}),
    "tied": ("llama-tied", "all-linear", {}),
    "gpt2": ("gpt2", "all-linear", {}),
    "mixtral": ("mixtral", "qkvo", {}),
    "phi3": ("phi3", "all-linear", {}),
    "opt": ("opt", "all-linear", {}),
    "falcon": ("falcon", "all-linear", {}),
    "gpt_neox": ("gpt_neox", "all-linear", {}),
    "gemma3": ("gemma3", "all-linear", {}),
    "rslora": ("llama", "qv", {"use_rslora": True}),
    "dora": ("llama", "qvd", {"use_dora": True}),
    "dora-gpt2": ("gpt2", "all-linear", {"use_dora": True}),
    "patterns": ("llama", "all-linear", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}),
    "head": ("llama", ["lm_head", "q_proj"], {}),
    "tied-head": ("llama-tied", ["lm_head", "q_proj"], {}),
    "tied-head-gpt2": ("gpt2", ["lm_head", "c_attn"], {}),
}


@pytest.mark.parametrize(("name", "targets", "settings"), CASES.values(), ids=CASES)
def test_a_merged_model_answers_as_base_and_adapter(tmp_path, base, adapter_of, logits_with, name, targets, settings):
    folder = base(name)
    adapter = adapter_of(folder, targets, **settings)

    merge(folder, adapter, tmp_path / "merged")

    expected, plain = logits_with(folder, adapter), logits_with(folder)
    for found, wanted, without in zip(logits_with(tmp_path / "merged"), expected, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
        assert (wanted - without).abs().max() > 0.01


def test_gpt2_as_the_hub_stores_it_without_its_prefix(tmp_path, base, adapter_of, logits_with):
    folder = base("gpt2")
    AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    assert "h.0.attn.c_attn.weight" in stored_tensors(folder)
    adapter = adapter_of(folder, ["c_attn", "c_proj", "lm_head"])

    merge(folder, adapter, tmp_path / "merged")

    assert set(stored_tensors(tmp_path / "merged")) == set(stored_tensors(folder)) | {"lm_head.weight"}
    _assert_equal(logits_with(tmp_path / "merged"), logits_with(folder, adapter))


def test_opt_as_the_hub_stores_it_without_its_prefix(tmp_path, base, adapter_of, logits_with):
    folder = base("opt")
    AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    adapter = adapter_of(folder)

    merge(folder, adapter, tmp_path / "merged")

    _assert_equal(logits_with(tmp_path / "merged"), logits_with(folder, adapter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_untouched_tensors_keep_their_bytes_and_changed_ones_their_dtype(tmp_path, base, adapter_of, dtype):
    folder = base("llama", dtype=dtype, max_shard_size="20KB")
    adapter = adapter_of(folder, "qv")

    report = merge(folder, adapter, tmp_path / "merged")

    before, after = _bytes_of(folder), _bytes_of(tmp_path / "merged")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{path}.weight" for path in adapter.layers}
    assert report.tensors == len(changed) == 4
    assert {name: t.dtype for name, t in stored_tensors(folder).items()} == {
        name: t.dtype for name, t in stored_tensors(tmp_path / "merged").items()
    }


def test_shards_and_their_index_are_kept(tmp_path, base, adapter_of, logits_with):
    folder = base("llama", max_shard_size="20KB")
    adapter = adapter_of(folder)

    merge(folder, adapter, tmp_path / "merged", dtype=torch.bfloat16)

    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert shards == sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors"))
    assert index["weight_map"] == json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.end - t.start for t in stored_tensors(tmp_path / "merged").values())
    assert logits_with(tmp_path / "merged")


def test_only_attention_of_mixtral_changes_and_its_experts_stay_apart_on_disk(tmp_path, base, adapter_of):
    folder = base("mixtral")
    assert any("experts.0.w1" in name for name in stored_tensors(folder))

    merge(folder, adapter_of(folder, "qkvo"), tmp_path / "merged")

    before, after = _bytes_of(folder), _bytes_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert all("self_attn" in name for name in before if before[name] != after[name])


def test_the_base_is_never_touched_and_the_tokenizer_goes_along(tmp_path, base, adapter_of, hashes):
    folder = base("llama")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "LICENSE").write_text("mine")
    before = hashes(folder)

    merge(folder, adapter_of(folder), tmp_path / "merged")

    assert hashes(folder) == before
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == [
        "LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "merge.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_the_tokenizer_of_the_run_replaces_the_base_s(tmp_path, base, adapter_of):
    folder, run = base("llama"), tmp_path / "run"
    run.mkdir()
    (run / "tokenizer_config.json").write_text("{}")
    (run / "tokenizer.json").write_text("{}")

    merge(folder, adapter_of(folder), tmp_path / "merged", tokenizer=run)

    assert (tmp_path / "merged/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "merged/chat_template.jinja").exists()


def test_code_that_the_config_names_is_not_named_where_it_is_not_copied(tmp_path, base, adapter_of):
    folder = base("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "own.Model"}}))

    merge(folder, adapter_of(folder), tmp_path / "merged")

    assert json.loads((tmp_path / "merged/config.json").read_text()) == config


def test_links_of_the_hub_s_cache_are_followed_and_files_written(tmp_path, base, adapter_of, logits_with):
    folder, cache = base("llama"), tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    folder.rename(cache / "blobs")
    for file in (cache / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    adapter = adapter_of(snapshot)

    merge(snapshot, adapter, tmp_path / "merged")

    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
    assert (tmp_path / "merged/tokenizer.json").is_file()
    _assert_equal(logits_with(tmp_path / "merged"), logits_with(snapshot, adapter))


def test_a_link_out_of_the_base_is_refused(tmp_path, base, adapter_of):
    folder, secret = base("llama"), tmp_path / "secret"
    secret.write_text("secret")
    (folder / "LICENSE").symlink_to(secret)

    with pytest.raises(SafetyError, match="a link that leads out of its folder"):
        merge(folder, adapter_of(folder), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_targeted_tied_head_gets_a_weight_of_its_own(tmp_path, base, adapter_of):
    folder = base("llama-tied")
    adapter = adapter_of(folder, ["lm_head"])

    report = merge(folder, adapter, tmp_path / "merged")

    tensors, embedding = load_file(tmp_path / "merged/model.safetensors"), "model.embed_tokens.weight"
    assert torch.equal(tensors[embedding], load_file(folder / "model.safetensors")[embedding])
    assert not torch.equal(tensors[embedding], tensors["lm_head.weight"])
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    assert report.untied == ("lm_head.weight",)


def test_a_tied_head_stays_tied_when_it_is_not_targeted(tmp_path, base, adapter_of):
    folder = base("llama-tied")

    merge(folder, adapter_of(folder), tmp_path / "merged")

    assert "lm_head.weight" not in stored_tensors(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("stored", ["head", "both"])
def test_a_tie_stored_under_the_head_s_name_or_under_both(tmp_path, base, adapter_of, logits_with, stored):
    folder = base("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if stored == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    adapter = adapter_of(folder, ["lm_head", "q_proj"])

    merge(folder, adapter, tmp_path / "merged")

    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(stored_tensors(tmp_path / "merged"))
    _assert_equal(logits_with(tmp_path / "merged"), logits_with(folder, adapter))


def test_a_chosen_dtype_holds_for_all_weights_and_stands_in_the_config(tmp_path, base, adapter_of):
    folder = base("llama", dtype=torch.bfloat16)

    report = merge(folder, adapter_of(folder), tmp_path / "merged", dtype=torch.float32)

    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "merged").values()} == {"F32"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32
    assert (report.dtypes, report.lost) == (("float32",), 0.0)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_what_storing_loses_is_what_a_direct_computation_finds(tmp_path, base, adapter_of, size, use_dora):
    folder = base("llama", dtype=torch.bfloat16)
    adapter = adapter_of(folder, size=size, use_dora=use_dora)

    report = merge(folder, adapter, tmp_path / "merged")

    lost, unmoved = _lost(folder, adapter, torch.bfloat16)
    assert report.lost == pytest.approx(lost, rel=1e-3) == report.lost_by_dtype["bfloat16"]
    assert report.unmoved_share == pytest.approx(unmoved, rel=1e-3)
    assert report.lost_by_dtype["float16"] == pytest.approx(_lost(folder, adapter, torch.float16)[0], rel=1e-3)
    assert report.lost_by_dtype["float32"] == 0 < report.lost_by_dtype["float16"] < report.lost


def test_a_weight_too_large_for_float16_is_refused_by_name_and_counted_as_lost(tmp_path, base, adapter_of):
    folder = base("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    adapter = adapter_of(folder)

    with pytest.raises(ModelError, match=r"q_proj.weight has values that float16 can't hold \(beyond 65,504\)"):
        merge(folder, adapter, tmp_path / "merged", dtype=torch.float16)
    assert merge(folder, adapter, tmp_path / "merged").as_dict()["lost_by_dtype"]["float16"] is None


def test_memory_holds_about_one_tensor_whatever_the_size_of_the_shard(tmp_path, base, adapter_of):
    folder = base("llama-tied")
    config = LlamaConfig.from_pretrained(folder, num_hidden_layers=10, intermediate_size=128)
    LlamaForCausalLM(config).save_pretrained(folder)
    adapter = adapter_of(folder)
    sizes = [tensor.end - tensor.start for tensor in stored_tensors(folder).values()]

    with TensorMemory() as memory:
        merge(folder, adapter, tmp_path / "merged", dtype=torch.bfloat16)

    assert len(list(folder.glob("*.safetensors"))) == 1
    beside_the_adapter = memory.peak - 4 * adapter.parameters
    assert max(sizes) < beside_the_adapter < 4 * max(sizes) < sum(sizes) / 3


def test_another_base_of_the_same_shape_is_refused(tmp_path, base, adapter_of):
    folder = base("llama")
    adapter = adapter_of(folder)
    base("llama", seed=7)

    with pytest.raises(ModelError) as caught:
        merge(folder, adapter, tmp_path / "merged")

    text = str(caught.value)
    assert "the adapter was trained on another base: they differ in " in text
    assert "lm_head.weight" in text
    assert "--allow-base-mismatch" in text
    assert list(tmp_path.iterdir()) == [folder]


def test_a_base_mismatch_that_is_allowed_is_recorded(tmp_path, base, adapter_of):
    folder = base("llama")
    adapter = adapter_of(folder)
    base("llama", seed=7)

    report = merge(folder, adapter, tmp_path / "merged", allow_base_mismatch=True)

    assert "lm_head.weight" in report.base_differences
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert record["allow_base_mismatch"] == list(report.base_differences)


def test_merging_the_same_adapter_twice_is_refused(tmp_path, base, adapter_of):
    folder = base("llama")
    adapter = adapter_of(folder)
    merge(folder, adapter, tmp_path / "merged")

    with pytest.raises(ModelError, match="this adapter is merged into this base already"):
        merge(tmp_path / "merged", adapter, tmp_path / "twice", allow_base_mismatch=True)


def test_two_adapters_merged_one_after_the_other_are_both_recorded(tmp_path, base, adapter_of):
    folder = base("llama")
    first, second = adapter_of(folder, seed=1), adapter_of(folder, seed=2)

    merge(folder, first, tmp_path / "one")
    merge(tmp_path / "one", second, tmp_path / "two", allow_base_mismatch=True)

    assert len(json.loads((tmp_path / "two/merge.json").read_text())["adapters"]) == 2
    with pytest.raises(ModelError, match="merged into this base already"):
        merge(tmp_path / "two", first, tmp_path / "three", allow_base_mismatch=True)


@pytest.mark.parametrize("name", ["base", "base/merged", "full", "file"])
def test_an_output_that_would_change_something_is_refused(tmp_path, base, adapter_of, hashes, name):
    folder = base("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = hashes(tmp_path)

    with pytest.raises(StorageError, match="--out"):
        merge(folder, adapter_of(folder), tmp_path / name)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ModelError])
@pytest.mark.parametrize("moment", ["writing", "proving"])
def test_a_merge_that_ends_early_leaves_nothing(tmp_path, base, adapter_of, hashes, error, moment):
    folder = base("llama", max_shard_size="20KB")
    adapter = adapter_of(folder)
    before = hashes(tmp_path)

    def stop(*_):
        assert len(list(tmp_path.iterdir())) == 2
        raise error

    hook = {"progress": stop} if moment == "writing" else {"prove": stop}
    with pytest.raises(error):
        merge(folder, adapter, tmp_path / "merged", **hook)
    assert list(tmp_path.iterdir()) == [folder]
    assert hashes(tmp_path) == before


def test_what_a_killed_merge_left_is_swept_by_the_next(tmp_path, base, adapter_of):
    folder = base("llama")
    leftover = tmp_path / ".tmp-merged-0a1b2c3d"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")

    merge(folder, adapter_of(folder), tmp_path / "merged")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, base, adapter_of, monkeypatch):
    folder = base("llama")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))

    with pytest.raises(StorageError, match="bytes are needed, 10 are free"):
        merge(folder, adapter_of(folder), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == [folder]


def test_an_adapter_of_other_modules_or_shapes_is_refused_by_name(tmp_path, base, adapter_of):
    folder = base("llama")
    adapter = adapter_of(folder, ["layers.0.self_attn.q_proj"])
    factors = adapter.layers["model.layers.0.self_attn.q_proj"]
    elsewhere = Adapter(adapter.config, {"model.layers.9.self_attn.q_proj": factors})
    wider = Adapter(adapter.config, {"model.layers.0.self_attn.q_proj": Factors(torch.ones(4, 33), factors.B)})

    with pytest.raises(ModelError, match=r"model.layers.9.self_attn.q_proj, which this base does not have"):
        merge(folder, elsewhere, tmp_path / "merged")
    with pytest.raises(ModelError, match=r"q_proj is \[32, 32\] in this base, and \[32, 33\] in the adapter"):
        merge(folder, wider, tmp_path / "merged")


def test_a_base_quantised_on_disk_is_refused(tmp_path, base, adapter_of):
    folder = base("llama")
    adapter = adapter_of(folder, "q")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(ModelError, match=r"the base is quantised on disk: .*q_proj.weight is stored as U8"):
        merge(folder, adapter, tmp_path / "merged", allow_base_mismatch=True)


def test_a_dead_adapter_is_refused(tmp_path, base, adapter_of):
    folder = base("llama")

    with pytest.raises(DivergedError, match="every lora_B is zero"):
        merge(folder, adapter_of(folder, size=0.0), tmp_path / "merged")


def test_a_base_cut_off_on_disk_is_named(tmp_path, base, adapter_of):
    folder = base("llama")
    adapter = adapter_of(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(ModelError, match="the file ends in the middle of its data"):
        merge(folder, adapter, tmp_path / "merged", allow_base_mismatch=True)
    assert list(tmp_path.iterdir()) == [folder]


def _assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def _bytes_of(folder) -> dict[str, bytes]:
    tensors = stored_tensors(folder)
    return {name: t.file.read_bytes()[t.start : t.end] for name, t in tensors.items()}


def _lost(folder, adapter: Adapter, dtype: torch.dtype) -> tuple[float, float]:
    """‖stored − (W + Δ)‖ / ‖Δ‖ and the share of weights that stay, all in float64 from the formula itself."""
    tensors = load_file(folder / "model.safetensors")
    update, error, moving, unmoved = 0.0, 0.0, 0, 0
    for path, factors in adapter.layers.items():
        W = tensors[f"{path}.weight"].double()
        wanted = W + adapter.config.at(path).scale * factors.B.double() @ factors.A.double()
        if factors.magnitude is not None:
            wanted = wanted * (factors.magnitude.double() / wanted.norm(dim=1)).unsqueeze(1)
        stored = wanted.to(dtype).double()
        update += float((wanted - W).square().sum())
        error += float((stored - wanted).square().sum())
        moving += wanted.numel()
        unmoved += int((stored == W).sum())
    return (error / update) ** 0.5, unmoved / moving
