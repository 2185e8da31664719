from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_cli.errors import DataError, ModelError, OutOfMemoryError
from lora_cli.export import proof
from lora_cli.export.merged import merge
from lora_cli.export.proof import compute_dtype, prove
from lora_cli.lora.adapter import Adapter, Factors
from lora_cli.models.base import Base
from lora_cli.models.load import load_model

logits = proof._logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "targets", "settings"),
    [
        ("llama", "all-linear", {}),
        ("llama", "all-linear", {"use_dora": True}),
        ("gpt2", "all-linear", {"use_rslora": True}),
        ("gpt2", "all-linear", {"use_dora": True}),
        ("mixtral", "qkvo", {}),
        ("llama-tied", ["lm_head", "q_proj"], {}),
    ],
    ids=str,
)
def test_a_right_merge_is_proved_in_every_dtype(tmp_path, base, adapter_of, rows, name, targets, settings, dtype):
    folder = base(name, dtype=torch.bfloat16)
    adapter = adapter_of(folder, targets, **settings)
    merge(folder, adapter, tmp_path / "merged", dtype=dtype)

    found = prove(Base(name, folder), adapter, tmp_path / "merged", rows)

    assert found.positions == sum(map(len, rows))
    assert found.computed_in == "float32"
    assert found.unexplained <= 1e-5 + 0.05 * found.largest_logit_difference
    assert found.kl < 0.05 * found.adapter_kl
    assert not found.storing_costs_much
    if dtype == torch.float32:
        assert found.largest_logit_difference < 1e-4


def test_the_printed_figures_are_those_of_the_two_models(tmp_path, base, adapter_of, rows, logits_with):
    folder = base("llama", dtype=torch.bfloat16)
    adapter = adapter_of(folder)
    merge(folder, adapter, tmp_path / "merged")

    found = prove(Base("llama", folder), adapter, tmp_path / "merged", rows)

    P, M, B = (torch.cat(logits_with(*of)).double() for of in ((folder, adapter), (tmp_path / "merged",), (folder,)))
    assert found.largest_logit_difference == pytest.approx(float((P - M).abs().max()), rel=1e-3)
    assert found.kl == pytest.approx(_kl(P, M), rel=1e-3)
    assert found.adapter_kl == pytest.approx(_kl(P, B), rel=1e-3)
    assert found.same_top1 == float((P.argmax(-1) == M.argmax(-1)).double().mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", ["a layer lost", "a wrong scale", "a transpose", "another tensor changed"])
def test_a_wrong_merge_is_not_proved(tmp_path, base, adapter_of, rows, dtype, fault):
    folder = base("gpt2", dtype=torch.bfloat16)
    adapter = adapter_of(folder)
    merge(folder, _with(fault, adapter), tmp_path / "merged", dtype=dtype)
    _damage(fault, folder, tmp_path / "merged")

    with pytest.raises(ModelError, match=r"the merged model does not answer as base \+ adapter"):
        prove(Base("gpt2", folder), adapter, tmp_path / "merged", rows)


def test_a_fold_that_does_not_act_as_its_layer_is_found(tmp_path, base, adapter_of, rows, monkeypatch):
    folder = base("llama")
    adapter = adapter_of(folder)
    merge(folder, adapter, tmp_path / "merged")
    right = Factors.merge_into
    monkeypatch.setattr(Factors, "merge_into", lambda factors, W, scale: right(factors, W, 1.05 * scale))

    with pytest.raises(ModelError, match=r"the merged weight of .*q_proj does not act as the layer"):
        prove(Base("llama", folder), adapter, tmp_path / "merged", rows)


def test_a_failed_proof_leaves_no_output(tmp_path, base, adapter_of, rows):
    folder = base("llama")
    adapter = adapter_of(folder)

    def prove_another(merged):
        return prove(Base("llama", folder), _with("a wrong scale", adapter), merged, rows)

    with pytest.raises(ModelError, match="nothing was written"):
        merge(folder, adapter, tmp_path / "merged", prove=prove_another)
    assert list(tmp_path.iterdir()) == [folder]


def test_where_float32_has_no_room_the_proof_computes_as_the_base_is_stored(
    tmp_path, base, adapter_of, rows, monkeypatch
):
    folder = base("llama", dtype=torch.bfloat16)
    adapter = adapter_of(folder)
    merge(folder, adapter, tmp_path / "merged")
    monkeypatch.setattr(proof, "free_bytes", lambda device: 100_000)

    found = prove(Base("llama", folder), adapter, tmp_path / "merged", rows)

    assert found.computed_in == "bfloat16"
    merge(folder, _with("a wrong scale", adapter), tmp_path / "wrong")
    with pytest.raises(ModelError, match="does not answer as base"):
        prove(Base("llama", folder), adapter, tmp_path / "wrong", rows)


def test_a_model_that_has_no_room_at_all_is_told_before_the_merge(base, monkeypatch):
    folder = base("llama")
    monkeypatch.setattr(proof, "free_bytes", lambda device: 1000)

    with pytest.raises(OutOfMemoryError, match="the proof loads the model once"):
        compute_dtype(folder, "cpu")


def test_two_models_are_never_in_memory_at_once(tmp_path, base, adapter_of, rows, monkeypatch):
    folder = base("llama")
    adapter = adapter_of(folder)
    merge(folder, adapter, tmp_path / "merged")
    alive, most, load = [], [], proof.load_model

    def counted(*args, **kwargs):
        import gc
        import weakref

        gc.collect()
        most.append(sum(model() is not None for model in alive))
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(proof, "load_model", counted)
    prove(Base("llama", folder), adapter, tmp_path / "merged", rows)

    assert most == [0, 0]


def test_rows_that_begin_alike_are_read_whole_and_compared_at_their_ends(
    tmp_path, base, adapter_of, logits_with, monkeypatch
):
    folder = base("llama")
    adapter = adapter_of(folder)
    merge(folder, adapter, tmp_path / "merged")
    template = [3] * 40
    rows = [template + [5 + i, 60 + i, 7] * 9 for i in range(20)] + [[]]
    read = []
    monkeypatch.setattr(proof, "_logits", lambda model, rows: read.append(rows) or logits(model, rows))

    found = prove(Base("llama", folder), adapter, tmp_path / "merged", rows)

    assert {tuple(map(tuple, rows[:16]))} == {tuple(fed) for fed in read}
    assert found.positions == 256
    ends = [_row_logits(folder, adapter, row)[-16:] for row in rows[:16]]
    assert found.largest_logit == pytest.approx(max(float(end.abs().max()) for end in ends), rel=1e-5)
    contexts = {tuple(row[: len(row) - back]) for row in rows[:16] for back in range(16)}
    assert len(contexts) == 256


def test_the_same_row_counts_once_and_a_long_one_is_cut(tmp_path, base, adapter_of):
    folder = base("llama")

    rows = proof._bounded(
        [[3] * 600, [4, 5], [4, 5], [3] * 700],
        load_model(Base("llama", folder), dtype=torch.float32),
        adapter_of(folder),
    )

    assert rows == [(3,) * 512, (4, 5)]


def test_rows_that_the_model_cannot_read_are_refused(tmp_path, base, adapter_of):
    folder = base("llama")
    adapter = adapter_of(folder)

    with pytest.raises(DataError, match="the proof has no row with any token"):
        prove(Base("llama", folder), adapter, folder, [[]])
    with pytest.raises(ModelError, match="the tokenizer has an id 320, and the base has 320 embeddings"):
        prove(Base("llama", folder), adapter, folder, [[320]])


def _row_logits(folder, adapter: Adapter, row: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapter.inject_into(model)
    with torch.no_grad():
        return model(input_ids=torch.tensor([row])).logits[0]


def _kl(P: torch.Tensor, Q: torch.Tensor) -> float:
    p, q = P.log_softmax(-1), Q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _with(fault: str, adapter: Adapter) -> Adapter:
    if fault == "a layer lost":
        layers = dict(list(adapter.layers.items())[1:])
        return replace(adapter, layers=layers, config=replace(adapter.config, target_modules=tuple(layers)))
    if fault == "a wrong scale":
        return replace(adapter, config=replace(adapter.config, lora_alpha=1.1 * adapter.config.lora_alpha))
    return adapter


def _damage(fault, base, merged):
    """A square projection merged the wrong way round, or one weight elsewhere that changed."""
    tensors, before = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    if fault == "a transpose":
        name = "transformer.h.0.attn.c_proj.weight"
        update = tensors[name].float() - before[name].float()
        tensors[name] = (before[name].float() + update.T).to(tensors[name].dtype)
    if fault == "another tensor changed":
        tensors["transformer.h.1.mlp.c_fc.bias"][0] += 0.1
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
