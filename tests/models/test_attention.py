"""Packed documents never see each other, on every architecture."""

import pytest
import torch
from layers import relative_difference
from tiny import CONFIGS, tiny_model

import lora_cli.models.attention as attention
from lora_cli.data.types import Example, RowId
from lora_cli.models.attention import block_mask, keeps_documents_apart, packed_arguments, packs
from lora_cli.objectives.sft import sft
from lora_cli.train.layout import Layout, micro_batches

EACH_MODEL = pytest.mark.parametrize("name", CONFIGS)
EACH_KIND = pytest.mark.parametrize("kind", ["sdpa", "eager"])


def rows() -> list[Example]:
    """Longer than the sliding windows of the tiny models, and shorter."""
    return [
        Example([3 + (7 * i + 11 * j) % 300 for j in range(size)], [0.0, 0.0, *[1.0] * (size - 2)], RowId("rows", i))
        for i, size in enumerate((90, 7, 33, 12, 70, 5))
    ]


def attending(name: str, kind: str):
    model = tiny_model(name)
    if kind == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no sdpa for this architecture")
    model.set_attn_implementation(kind)
    return model


def loss_and_gradients(model, layout: Layout) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for _, batch in micro_batches(rows(), layout, rank=0, processes=1):
        loss = sft(model, batch).total
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EACH_KIND
@EACH_MODEL
def test_packed_and_unpacked_rows_have_the_same_loss_and_gradients(name, kind):
    model = attending(name, kind)

    packed_loss, packed = loss_and_gradients(model, Layout(2, 120))
    loss, alone = loss_and_gradients(model, Layout(1))

    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert max(relative_difference(packed[key], alone[key]) for key in alone if alone[key].abs().max() > 1e-7) <= 2e-5


@EACH_KIND
@EACH_MODEL
def test_what_one_document_says_does_not_move_the_other(name, kind):
    model = attending(name, kind)
    documents = torch.tensor([[0] * 6 + [1] * 8])
    places = torch.cat([torch.arange(6), torch.arange(8)]).unsqueeze(0)
    ids = torch.randint(5, 300, (1, 14))
    other = torch.cat([torch.randint(5, 300, (1, 6)), ids[:, 6:]], dim=1)

    with torch.no_grad():
        extra = packed_arguments(model, documents, places)
        first, second = (model(input_ids=row, use_cache=False, **extra).logits[:, 6:] for row in (ids, other))

    assert torch.equal(first, second)


@EACH_MODEL
def test_the_probe_passes_where_documents_are_kept_apart(name):
    assert packs(tiny_model(name))


@EACH_MODEL
def test_the_probe_sees_a_mask_that_is_ignored(name, monkeypatch):
    model = tiny_model(name)
    monkeypatch.setitem(attention.PACKED, model.config._attn_implementation, lambda *_: {})

    assert not keeps_documents_apart(model)


def test_rows_are_not_packed_where_the_attention_has_no_borders_and_that_is_said(caplog):
    model = tiny_model("llama")
    model.set_attn_implementation("flex_attention")

    assert not packs(model)
    assert "rows are not packed: with `model.attention: flex_attention`" in caplog.text


def test_the_mask_is_causal_within_a_document_and_a_window():
    documents = torch.tensor([[0, 0, 0, 1, 1]])

    assert block_mask(documents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip
    assert block_mask(documents, window=2)[0, 0, 2].int().tolist() == [0, 1, 1, 0, 0]
