"""`lora eval` against a loss computed by hand: transformers' logits, Σ nll / Σ tokens over the answers."""

import json

import pytest
import torch
from peft import PeftModel
from running import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CHATS = [
    [("user", "what is the cat?"), ("assistant", "the cat sat"), ("user", "and the mat?"), ("assistant", "on it")],
    [("system", "be short"), ("user", "that?"), ("assistant", "the answer to that question")],
]


@pytest.fixture
def trained(lora, recipe, tmp_path):
    lora("train", recipe({"data.eval": "25%"}))
    return tmp_path / "out"


def mean_loss(model, rows: list[tuple[list[int], set[int]]]) -> tuple[float, int]:
    """Of the tokens at the given places, row by row: no padding, no batches."""
    nll = tokens = 0
    with torch.no_grad():
        for ids, places in rows:
            logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            nll -= sum(logps[place - 1, ids[place]].item() for place in places)
            tokens += len(places)
    return nll / tokens, tokens


def completions(file, tokenizer) -> list[tuple[list[int], set[int]]]:
    """Prompt and completion as they stand, and the end token; the completion and the end token are learned."""
    rows = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        prompt, answer = (tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", "completion"))
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        rows.append((ids, set(range(len(prompt), len(ids)))))
    return rows


def conversations(tokenizer) -> list[tuple[list[int], set[int]]]:
    """ChatML as its template writes it, by hand; the answers and their stop tokens are learned."""
    start, stop = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def text(written: str) -> list[int]:
        return tokenizer(written, add_special_tokens=False).input_ids

    rows = []
    for chat in CHATS:
        ids, places = [], set()
        for role, content in chat:
            ids += [start, *text(f"{role}\n")]
            before = len(ids)
            ids += [*text(content), stop]
            places |= set(range(before, len(ids))) if role == "assistant" else set()
            ids += text("\n")
        rows.append((ids, places))
    return rows


def measured(lora, adapter, base, file) -> dict:
    return lora("eval", "--adapter", adapter, "--base", base, "--data", file, "--json").json


def assert_by_hand(found: dict, rows, base, adapter) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loss, tokens = mean_loss(plain, rows)
    assert found["base"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["tokens"] == tokens

    adapted, _ = mean_loss(PeftModel.from_pretrained(plain, adapter), rows)
    assert found["adapter"]["loss"] == pytest.approx(adapted, rel=1e-6)
    assert found["adapter"]["perplexity"] == pytest.approx(torch.tensor(adapted).exp().item(), rel=1e-5)
    assert adapted < loss


def test_on_completions_it_is_the_sum_over_answers_and_end_tokens_divided_once(trained, lora, tiny_llama, tmp_path):
    file = write_rows(tmp_path / "held_out.jsonl", 20)

    found = measured(lora, trained, tiny_llama, file)

    assert_by_hand(found, completions(file, AutoTokenizer.from_pretrained(tiny_llama)), tiny_llama, trained)
    assert found["rows"] == 20


def test_on_conversations_every_answer_counts_with_its_stop_token(trained, lora, tiny_llama, tmp_path):
    file = tmp_path / "chats.jsonl"
    rows = ({"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = measured(lora, trained, tiny_llama, file)

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    base, _ = mean_loss(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), conversations(tokenizer))
    assert found["base"]["loss"] == pytest.approx(base, rel=1e-6)
    assert found["tokens"] == sum(len(places) for _, places in conversations(tokenizer))


def test_the_recipes_held_out_rows_give_the_figures_of_the_run(trained, lora, recipe, tmp_path):
    from running import events

    found = lora("eval", recipe({"data.eval": "25%"}), "--json").json

    first, last = events(trained, "evaluated")
    assert found["base"]["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert found["adapter"]["loss"] == pytest.approx(last["loss"], rel=1e-6)


def test_the_base_alone_can_be_measured(lora, tiny_llama, tmp_path):
    found = lora("eval", "--base", tiny_llama, "--data", write_rows(tmp_path / "rows.jsonl"), "--json").json

    assert "adapter" not in found
    assert found["base"]["loss"] > 0


def test_an_adapter_of_another_base_is_refused_and_a_named_switch_lets_it_pass(trained, lora, tmp_path):
    from tiny import tiny_base

    other, file = tiny_base(tmp_path / "other", seed=9), write_rows(tmp_path / "rows.jsonl")
    ask = ("eval", "--adapter", trained, "--base", other, "--data", file)

    done = lora(*ask, code=4)

    assert "the adapter was trained on another base" in done.err
    assert "--allow-base-mismatch" in lora(*ask, "--allow-base-mismatch").err
