"""The objective of classification: a sum over rows, and counts by label that make accuracy and macro-F1."""

import pytest
import torch
import torch.nn.functional as F

from lora_cli.objectives.classify import accuracy_and_f1, classify, counts

IDS = torch.tensor([[3, 4, 0], [5, 6, 7]])


class Answers(torch.nn.Module):
    """Gives the logits that it was made with."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.config = type("Config", (), {"pad_token_id": 9, "type_vocab_size": 0})

    def forward(self, input_ids, attention_mask):
        self.seen = input_ids
        return self


def batch(labels, weights):
    return {
        "input_ids": IDS,
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "labels": torch.tensor(labels),
        "weights": torch.tensor(weights),
    }


def test_the_loss_is_the_sum_of_the_rows():
    logits = torch.randn(2, 4)

    found = classify(Answers(logits), batch([1, 3], [1.0, 1.0]))

    torch.testing.assert_close(found.total, F.cross_entropy(logits, torch.tensor([1, 3]), reduction="sum"))


def test_a_row_without_weight_counts_for_nothing():
    logits = torch.randn(2, 4)

    one, both = classify(Answers(logits), batch([1, 3], [1.0, 0.0])), classify(Answers(logits), batch([1, 3], [1.0, 1]))

    torch.testing.assert_close(one.total, F.cross_entropy(logits[:1], torch.tensor([1]), reduction="sum"))
    assert one.metrics["actual"].sum() == 1
    assert both.metrics["actual"].sum() == 2


def test_padding_becomes_the_models_own_padding_token():
    model = Answers(torch.zeros(2, 4))

    classify(model, batch([0, 0], [1.0, 1.0]))

    assert model.seen.tolist() == [[3, 4, 9], [5, 6, 7]]


def figures(actual: list[int], chosen: list[int], size: int) -> dict[str, float]:
    return accuracy_and_f1(counts(torch.tensor(chosen), torch.tensor(actual), torch.ones(len(actual)), size))


def test_accuracy_is_the_share_of_right_rows_and_macro_f1_the_mean_over_labels():
    found = figures(actual=[0, 0, 0, 1, 2], chosen=[0, 0, 1, 1, 0], size=3)

    f1 = [2 * 2 / (3 + 3), 2 * 1 / (1 + 2), 0.0]
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx(sum(f1) / 3)


def test_a_label_that_no_row_has_and_none_was_given_does_not_count():
    assert figures(actual=[0, 1], chosen=[0, 1], size=9) == {"accuracy": 1.0, "macro_f1": 1.0}


def test_counts_of_parts_add_up_to_those_of_the_whole():
    actual, chosen, weights = torch.randint(5, (40,)), torch.randint(5, (40,)), torch.ones(40)
    whole = counts(chosen, actual, weights, 5)

    halves = [counts(chosen[part], actual[part], weights[part], 5) for part in (slice(0, 13), slice(13, 40))]

    for name, total in whole.items():
        assert torch.equal(halves[0][name] + halves[1][name], total)
