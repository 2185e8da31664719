import json

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.errors import ModelError, StorageError
from lora_cli.export.merged import merge
from lora_cli.export.unmerge import unmerge
from lora_cli.lora.base_files import stored_tensors


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "size"), [("llama", 1e-3), ("llama", 0.5), ("gpt2", 0.02), ("mixtral", 0.02)])
def test_unmerging_ends_within_the_printed_distance_of_the_base(tmp_path, base, adapter_of, name, size, stored):
    folder = base(name, dtype=torch.bfloat16, max_shard_size="40KB")
    adapter = adapter_of(folder, "qkv" if name != "gpt2" else "all-linear", size=size)
    merge(folder, adapter, tmp_path / "merged", dtype=stored)

    report = unmerge(tmp_path / "merged", adapter, tmp_path / "back", base=folder)

    largest, mean, equal = _distance(folder, tmp_path / "back", adapter)
    assert (report.largest, report.mean, report.equal_share) == pytest.approx((largest, mean, equal))
    assert 0 < report.largest <= report.possible
    assert report.possible < 100 * report.largest
    assert report.recorded


def test_what_the_adapter_did_not_change_is_the_base_bit_for_bit(tmp_path, base, adapter_of):
    folder = base("llama", dtype=torch.bfloat16)
    adapter = adapter_of(folder, "q")
    merge(folder, adapter, tmp_path / "merged")

    unmerge(tmp_path / "merged", adapter, tmp_path / "back")

    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "q_proj" not in name)
    assert not (tmp_path / "back/merge.json").exists()


def test_a_float32_result_of_a_rounded_merge_is_bounded_too(tmp_path, base, adapter_of):
    folder = base("llama", dtype=torch.bfloat16)
    adapter = adapter_of(folder)
    merge(folder, adapter, tmp_path / "merged")

    narrow = unmerge(tmp_path / "merged", adapter, tmp_path / "back", base=folder)
    wide = unmerge(tmp_path / "merged", adapter, tmp_path / "wide", dtype=torch.float32, base=folder)

    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "wide").values()} == {"F32"}
    assert wide.largest <= wide.possible < narrow.possible


def test_a_head_that_the_merge_untied_gets_its_tie_back(tmp_path, base, adapter_of, logits_with):
    folder = base("llama-tied")
    adapter = adapter_of(folder, ["lm_head"])
    merge(folder, adapter, tmp_path / "merged")

    report = unmerge(tmp_path / "merged", adapter, tmp_path / "back", base=folder)

    assert stored_tensors(tmp_path / "back").keys() == stored_tensors(folder).keys()
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is True
    assert report.largest == 0
    for found, expected in zip(logits_with(tmp_path / "back"), logits_with(folder), strict=True):
        assert torch.equal(found, expected)


def test_one_of_two_merged_adapters_comes_off_and_the_other_stays(tmp_path, base, adapter_of, logits_with):
    folder = base("llama")
    first, second = adapter_of(folder, seed=1), adapter_of(folder, seed=2)
    merge(folder, first, tmp_path / "one")
    merge(tmp_path / "one", second, tmp_path / "two", allow_base_mismatch=True)

    unmerge(tmp_path / "two", first, tmp_path / "back")

    for found, expected in zip(logits_with(tmp_path / "back"), logits_with(folder, second), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert len(json.loads((tmp_path / "back/merge.json").read_text())["adapters"]) == 1
    with pytest.raises(ModelError, match="this adapter is not among those merged into this folder"):
        unmerge(tmp_path / "back", first, tmp_path / "again")


def test_a_difference_that_rounding_cannot_explain_is_an_error(tmp_path, base, adapter_of):
    folder = base("llama")
    adapter = adapter_of(folder)
    merge(folder, adapter, tmp_path / "merged")
    other = base("llama", seed=3)

    with pytest.raises(ModelError, match=r"merged − adapter is not this base: .* differs by .*, and rounding explains"):
        unmerge(tmp_path / "merged", adapter, tmp_path / "back", base=other)
    assert not (tmp_path / "back").exists()


def test_a_dora_adapter_is_refused_with_the_reason(tmp_path, base, adapter_of):
    folder = base("llama")
    adapter = adapter_of(folder, use_dora=True)
    merge(folder, adapter, tmp_path / "merged")

    with pytest.raises(ModelError, match="the merge scaled each row"):
        unmerge(tmp_path / "merged", adapter, tmp_path / "back")


def test_the_merged_folder_is_never_touched(tmp_path, base, adapter_of, hashes):
    folder = base("llama")
    adapter = adapter_of(folder)
    merge(folder, adapter, tmp_path / "merged")
    before = hashes(tmp_path / "merged")

    unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    with pytest.raises(StorageError, match="--out"):
        unmerge(tmp_path / "merged", adapter, tmp_path / "merged/base")

    assert hashes(tmp_path / "merged") == before


def _distance(base, back, adapter) -> tuple[float, float, float]:
    before, after = _weights(base), _weights(back)
    changed = [(before[f"{path}.weight"], after[f"{path}.weight"]) for path in adapter.layers]
    gaps = torch.cat([(b.double() - a.double()).abs().flatten() for b, a in changed])
    return float(gaps.max()), float(gaps.mean()), float((gaps == 0).double().mean())


def _weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
