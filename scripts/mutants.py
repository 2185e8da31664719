"""Planted faults: the silent ways to ruin a fine-tuning run, put into the code one by one. The tests must notice each.

    python scripts/mutants.py [NAME …] [--list] [--jobs 2]

Each fault is one change of the text in a copy of the project, and the few tests that have to fail then. A fault that
they let pass is a hole in the tests: it is named, and the exit code is 1.
"""

import argparse
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("lora_cli", "tests", "scripts", "configs", "docs", "recipes", "pyproject.toml", "README.md", "Makefile")
FAILED, PASSED, UNUSABLE = 1, 0, 3  # pytest's exit codes; but for the first two, it could not run the tests
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
WARM = ("torch", "accelerate", "peft", "transformers.models.llama.modeling_llama", "transformers.trainer_utils")
SECONDS = 900  # for the tests of one fault: ten times what they take on two idle cores


class Mutant(NamedTuple):
    """`text` stands once in `file` (of lora_cli) and becomes `planted`; of `tests`, under tests/, one fails then."""

    name: str
    file: str
    text: str
    planted: str
    tests: str

    @property
    def path(self) -> Path:
        return Path("lora_cli", self.file)

    @property
    def selection(self) -> list[str]:
        return [f"tests/{test}" for test in self.tests.split()]


class Outcome(NamedTuple):
    mutant: Mutant
    killed_by: str | None  # the first test that failed
    seconds: float


class Unusable(Exception):
    """The list does not fit the code or the tests."""


MUTANTS = (
    # The scale, the starts, and the layer
    Mutant(
        "scale is alpha, not alpha/r",
        "lora/config.py",
        "return self.lora_alpha / (sqrt(self.r) if self.use_rslora else self.r)",
        "return self.lora_alpha",
        "lora/test_config.py",
    ),
    Mutant(
        "scale is alpha/r²",
        "lora/config.py",
        "return self.lora_alpha / (sqrt(self.r) if self.use_rslora else self.r)",
        "return self.lora_alpha / (self.r if self.use_rslora else self.r**2)",
        "lora/test_config.py",
    ),
    Mutant(
        "rsLoRA is ignored",
        "lora/config.py",
        "return self.lora_alpha / (sqrt(self.r) if self.use_rslora else self.r)",
        "return self.lora_alpha / self.r",
        "lora/test_config.py",
    ),
    Mutant(
        "a start taken off doubles the rank of rsLoRA and not its alpha",
        "lora/config.py",
        "alpha_factor = sqrt(factor) if self.use_rslora else factor",
        "alpha_factor = factor",
        "lora/test_config.py lora/test_layer_laws.py::test_saved_and_loaded_into_the_unchanged_base_it_answers_the_same",
    ),
    Mutant(
        "PiSSA starts without the scale",
        "lora/init.py",
        "root = (S[..., :r] / layer.scale).sqrt()",
        "root = S[..., :r].sqrt()",
        "lora/test_inject.py::test_pissa_starts_at_the_best_approximation_of_the_weight",
    ),
    Mutant(
        "a start that is not zero is not taken off",
        "lora/layer.py",
        "if take_off:",
        "if False:",
        "lora/test_layer_laws.py::test_training_starts_at_the_base_model",
    ),
    Mutant(
        "all layers start alike",
        "lora/inject.py",
        "init(layers[path], generator_for(seed, path),",
        "init(layers[path], generator_for(seed),",
        "lora/test_inject.py::test_different_paths_start_differently",
    ),
    Mutant(
        "the base is trained too",
        "lora/inject.py",
        "model.requires_grad_(False)",
        "model.requires_grad_(True)",
        "lora/test_inject.py::test_the_model_is_frozen_but_for_the_factors",
    ),
    Mutant(
        "the check that the base stood still looks at nothing",
        "lora/inject.py",
        "if not tensor.requires_grad and id(tensor) not in seen:",
        "if False:",
        "lora/test_inject.py::test_the_digest_of_the_base_tells_any_change_of_it_and_none_of_the_factors",
    ),
    Mutant(
        "a base that has changed is taken for a frozen one",
        "runs/train.py",
        "if not run.recipe.training.full and frozen_digest(run.model) != run.frozen:",
        "if False:",
        "laws/test_run_folder.py::test_a_base_that_changed_in_training_is_an_error_and_no_adapter_is_written",
    ),
    Mutant(
        "full fine-tuning overwrites a base that others share",
        "runs/train.py",
        "(load_model if full else load or load_model)",
        "(load or load_model)",
        "laws/test_full.py::test_an_adapter_beside_a_full_run_is_the_one_that_is_trained_alone",
    ),
    Mutant(
        "dropout acts on nothing",
        "lora/layer.py",
        "dropped = self.dropout(x) if self.training and self.dropout.p else None",
        "dropped = None",
        "lora/test_layer_laws.py::test_dropout_acts_in_training_alone_and_on_the_update_alone",
    ),
    Mutant(
        "the lean step forgets the update's share of the gradient of x",
        "kernels/lora_linear.py",
        "dx.addmm_(d_thin, A.to(kind))",
        "pass",
        "laws/test_lean_step.py::test_the_lean_step_is_the_plain_one_on_every_architecture",
    ),
    Mutant(
        "the loss in stretches forgets the weights of tokens in its gradient",
        "kernels/cross_entropy.py",
        "share = weights.unsqueeze(1) * head.scale",
        "share = torch.full_like(weights, head.scale).unsqueeze(1)",
        "laws/test_lean_step.py::test_the_lean_step_is_the_plain_one_on_every_architecture",
    ),
    Mutant(
        "a cap on the logits is left out",
        "models/logits.py",
        '(None, None, "final_logit_softcapping")',
        "PLAIN",
        "laws/test_lean_step.py::test_the_lean_step_is_the_plain_one_on_every_architecture",
    ),
    Mutant(
        "DoRA stretches the bias",
        "lora/layer.py",
        "without_bias = y if bias is None else y - _before(self.trailing, bias.to(y.dtype))",
        "without_bias = y",
        "lora/test_layer_laws.py::test_the_merged_weight_gives_the_output_of_the_layer",
    ),
    Mutant(
        "DoRA divides by the norm of the base alone",
        "lora/layer.py",
        "norm = row_norms(merged_weight(self.dense(), *self.factors(), self.scale))",
        "norm = row_norms(self.dense().float())",
        "lora/test_layer_laws.py::test_the_merged_weight_gives_the_output_of_the_layer",
    ),
    Mutant(
        "Conv1D is read as it lies",
        "lora/weights.py",
        "lambda layer: layer.weight.T, transposed=True",
        "lambda layer: layer.weight, transposed=True",
        "lora/test_inject.py::test_a_storage_knows_the_shape_of_its_dense_weight",
    ),
    Mutant(
        "what is trained whole is not used",
        "lora/whole.py",
        "return functional_call(self.base, used, args, kwargs)",
        "return self.base(*args, **kwargs)",
        "lora/test_whole.py",
    ),
    # The files of PEFT
    Mutant(
        "keys lack PEFT's prefix",
        "lora/peft_tables.py",
        'PREFIX = "base_model.model."',
        'PREFIX = "base_model."',
        "lora/test_peft_both_ways.py",
    ),
    Mutant(
        "alphas of single layers are not saved",
        "lora/peft_format.py",
        '"alpha_pattern": {pattern: _whole(alpha) for pattern, alpha in config.alpha_pattern.items()},',
        '"alpha_pattern": {},',
        "lora/test_peft_both_ways.py lora/test_peft_format.py lora/test_adapter.py",
    ),
    Mutant(
        "PEFT is not told of a transposed base",
        "lora/peft_format.py",
        '"fan_in_fan_out": transposed,',
        '"fan_in_fan_out": False,',
        "lora/test_peft_both_ways.py lora/test_peft_format.py",
    ),
    Mutant(
        "settings that are not read are passed over",
        "lora/peft_format.py",
        "if key in found and found[key] not in plain",
        "if False",
        "lora/test_peft_format.py::test_a_setting_that_would_be_ignored_is_refused",
    ),
    Mutant(
        "another base has the same fingerprint",
        "lora/base_files.py",
        'return names or (["the names, types or shapes of the tensors"] if self.layout != other.layout else [])',
        "return []",
        "lora/test_base_files.py",
    ),
    Mutant(
        "a base of another fingerprint is taken",
        "lora/adapter.py",
        "if differences and not allow:",
        "if False:",
        "lora/test_adapter.py",
    ),
    Mutant(
        "a dead adapter passes",
        "lora/adapter.py",
        "or any(factors.act() for factors in self.layers.values())",
        "or True",
        "lora/test_adapter.py::test_an_adapter_that_was_not_trained_does_nothing_whatever_it_started_from",
    ),
    # Rendering
    Mutant(
        "the stop token of an answer is not trained",
        "data/render.py",
        "return prompt, answer[:stop], weights[:last] + [1.0] * (stop - last)",
        "return prompt, answer[:stop], weights[: stop - 1] + [0.0]",
        "data/test_render.py",
    ),
    Mutant(
        "the end token of a completion is not trained",
        "data/render.py",
        "weights.append(1.0)",
        "weights.append(0.0)",
        "data/test_render.py::test_a_completion_is_trained_behind_the_prompt_of_inference_up_to_the_end_token",
    ),
    Mutant(
        "the trained span begins a token early",
        "data/render.py",
        "weights = weights + [0.0] * (len(prompt) - len(input_ids)) + scaled",
        "weights = weights + [0.0] * (len(prompt) - len(input_ids) - 1) + scaled + [0.0]",
        "data/test_render.py",
    ),
    Mutant(
        "turns are joined whatever the next prompt begins with",
        "data/render.py",
        "if prompt[: len(input_ids)] != input_ids:",
        "if len(prompt) < len(input_ids):",
        "data/test_render.py::test_a_template_that_drops_earlier_reasoning_makes_an_example_an_answer",
    ),
    Mutant(
        "the prompt lacks what the template puts before an answer",
        "data/render.py",
        "before = self._template(messages[:-1], tools, add_generation_prompt=True)",
        "before = self._template(messages[:-1], tools)",
        "data/test_render.py",
    ),
    Mutant(
        "BOS stands twice",
        "data/render.py",
        "return ids if ids[:1] == self._bos else self._bos + ids",
        "return self._bos + ids",
        "data/test_render.py",
    ),
    Mutant(
        "a template that writes BOS twice is taken",
        "data/render.py",
        "if self.tokenizer.bos_token_id is not None and",
        "if False and",
        "data/test_render.py::test_a_template_that_writes_bos_twice_makes_a_bad_row",
    ),
    Mutant(
        "weights of messages are ignored",
        "data/render.py",
        "scaled = [message.weight * weight for weight in answer_weights]",
        "scaled = list(answer_weights)",
        "data/test_render.py::test_the_weight_of_a_message_is_that_of_its_tokens_and_counts_in_the_divisor",
    ),
    Mutant(
        "truncation keeps the end",
        "data/render.py",
        "input_ids=example.input_ids[:max_length], weights=example.weights[:max_length]",
        "input_ids=example.input_ids[-max_length:], weights=example.weights[-max_length:]",
        "data/test_render.py::test_truncation_keeps_the_first_tokens_and_counts_the_rest",
    ),
    # Rows
    Mutant(
        "rows with nothing to learn are kept",
        "data/tokenizing.py",
        "if (short := truncate(example, self.how.max_length)).items]",
        "if (short := truncate(example, self.how.max_length))]",
        "data/test_pipeline.py::test_few_answers_lost_to_max_length_are_left_out_and_counted",
    ),
    Mutant(
        "held-out rows are trained too",
        "data/order.py",
        "return examples.take(np.flatnonzero(~held_out[row_of])), ",
        "return examples, ",
        "data/test_pipeline.py::test_a_split_covers_all_rows_and_no_row_twice_in_file_order",
    ),
    Mutant(
        "every epoch has the same order",
        "data/order.py",
        'return _permutation(f"epoch {epoch} of {seed}", count)',
        'return _permutation(f"epoch of {seed}", count)',
        "data/test_pipeline.py::test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch",
    ),
    Mutant(
        "the order comes from the global random numbers",
        "data/order.py",
        "torch.randperm(count, generator=torch.Generator().manual_seed(seed))",
        "torch.randperm(count)",
        "data/test_pipeline.py::test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch",
    ),
    Mutant(
        "a resumed run begins with the first rows again",
        "data/order.py",
        "_stretch(epoch_of, length, k * size,",
        "_stretch(epoch_of, length, (k - start) * size,",
        "data/test_pipeline.py::test_resuming_is_skipping",
    ),
    Mutant(
        "a resumed run leaves a row out",
        "data/order.py",
        "_stretch(epoch_of, length, k * size,",
        "_stretch(epoch_of, length, k * size + (start > 0),",
        "data/test_pipeline.py::test_resuming_is_skipping",
    ),
    Mutant(
        "the fingerprint of the rows forgets their weights",
        "data/examples.py",
        "np.repeat(block.lengths, block.lengths)] = block.weights",
        "np.repeat(block.lengths, block.lengths)] = 0",
        "data/test_pipeline.py::test_the_fingerprint_is_of_tokens_weights_and_order",
    ),
    # Batches
    Mutant(
        "labels are not shifted",
        "data/collate.py",
        "labels[i, : end - 1] = input_ids[i, 1:end].where(",
        "labels[i, : end - 1] = input_ids[i, : end - 1].where(",
        "data/test_collate.py",
    ),
    Mutant(
        "weights are not shifted",
        "data/collate.py",
        "for weight in example.weights][1:])",
        "for weight in example.weights][:-1])",
        "data/test_collate.py",
    ),
    Mutant(
        "padding is told by its id",
        "data/collate.py",
        ".where(weights[i, : end - 1] > 0, IGNORE)",
        ".where((weights[i, : end - 1] > 0) & (input_ids[i, 1:end] != 0), IGNORE)",
        "data/test_collate.py",
    ),
    Mutant(
        "positions do not restart in packed documents",
        "data/collate.py",
        "places = [torch.cat([torch.arange(size) for size in row]) for row in sizes]",
        "places = [torch.arange(sum(row)) for row in sizes]",
        "data/test_collate.py::test_a_packed_row_tells_its_documents_and_restarts_their_places",
    ),
    Mutant(
        "packed documents see each other",
        "models/attention.py",
        "return (seen & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)",
        "return seen.expand(len(documents), *seen.shape).unsqueeze(1)",
        "models/test_attention.py",
    ),
    Mutant(
        "a document is predicted from the one before it",
        "data/render.py",
        "weights[:1] = [0.0]  #",
        "weights[:1] = weights[:1]  #",
        "data/test_render.py",
    ),
    Mutant(
        "losses of sources are swapped",
        "data/collate.py",
        "found[sources.index(example.row.source), i, start : end - 1] = True",
        "found[-1 - sources.index(example.row.source), i, start : end - 1] = True",
        "laws/test_sources.py::test_the_losses_of_the_sources_are_those_of_their_rows_alone",
    ),
    # The loss and its divisor
    Mutant(
        "prompts count in the divisor",
        "data/types.py",
        "return sum(self.weights)",
        "return float(len(self.weights))",
        "train/test_loop.py::test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens",
    ),
    Mutant(
        "the divisor counts tokens, not their weights",
        "data/types.py",
        "return sum(self.weights)",
        "return float(sum(weight > 0 for weight in self.weights))",
        "data/test_render.py::test_the_weight_of_a_message_is_that_of_its_tokens_and_counts_in_the_divisor",
    ),
    Mutant(
        "the loss of a batch is a mean",
        "objectives/sft.py",
        "return Loss(losses.sum(), {})",
        "return Loss(losses.sum() / weights.count_nonzero().clamp(min=1), {})",
        "train/test_loop.py::test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens",
    ),
    Mutant(
        "weights of tokens are ignored in the loss",
        "kernels/cross_entropy.py",
        "return losses.mul_(weights)",
        "return losses",
        "objectives/test_sft.py",
    ),
    Mutant(
        "micro-batches are divided one by one",
        "train/task.py",
        "self.accelerator.backward(loss.total / items)",
        'self.accelerator.backward(loss.total / batch["weights"].sum().clamp(min=1))',
        "train/test_loop.py::test_gradients_do_not_depend_on_the_micro_batches",
    ),
    Mutant(
        "the loss is divided by the number of micro-batches too",
        "train/loop.py",
        "parts.learn(batch, items, dropout)",
        "parts.learn(batch, items * (len(rows) // progress.layout.micro_batch_size), dropout)",
        "train/test_loop.py::test_gradients_do_not_depend_on_the_micro_batches",
    ),
    Mutant(
        "rows that are classified weigh alike",
        "objectives/classify.py",
        "return Loss(losses @ weights, metrics)",
        "return Loss(losses.sum(), metrics)",
        "objectives/test_classify.py::test_a_row_without_weight_counts_for_nothing",
    ),
    # Steps
    Mutant(
        "dropout is the same at every step",
        "train/loop.py",
        'derived_seed(parts.settings.seed, "dropout", number, first)',
        'derived_seed(parts.settings.seed, "dropout", first)',
        "train/test_loop.py::test_dropout_is_drawn_anew_at_every_step",
    ),
    Mutant(
        "dropout depends on what was drawn before",
        "train/task.py",
        "torch.manual_seed(seed)",
        "torch.initial_seed()",
        "train/test_loop.py::test_dropout_is_a_function_of_seed_and_step_not_of_what_was_drawn_before",
    ),
    Mutant(
        "a loss that is not finite is applied",
        "train/loop.py",
        "if not math.isfinite(loss) or not math.isfinite(grad_norm) or (spike and parts.rewind):",
        "if spike and parts.rewind:",
        "train/test_numerics.py",
    ),
    Mutant(
        "a gradient that is not finite is applied",
        "train/loop.py",
        "if not math.isfinite(loss) or not math.isfinite(grad_norm) or (spike and parts.rewind):",
        "if not math.isfinite(loss) or (spike and parts.rewind):",
        "train/test_numerics.py::test_a_gradient_that_is_not_finite_counts_as_much_as_a_loss",
    ),
    Mutant(
        "gradients are not clipped",
        "train/loop.py",
        "parts.settings.max_grad_norm or math.inf",
        "math.inf",
        "train/test_loop.py::test_the_gradient_norm_told_is_that_before_clipping_and_clipping_bounds_the_step",
    ),
    Mutant(
        "the learning rate is that of the step before",
        "train/loop.py",
        "parts.schedule(number)",
        "parts.schedule(number - 1)",
        "train/test_loop.py::test_each_step_has_the_rate_of_its_own_number",
    ),
    Mutant(
        "the warm-up begins at zero",
        "train/schedule.py",
        "step / warmup if step <= warmup else",
        "(step - 1) / warmup if step <= warmup else",
        "train/test_schedule.py::test_no_step_is_spent_on_nothing_and_the_peak_is_reached_and_never_passed",
    ),
    Mutant(
        "the learning rate shrinks by its factor at every step",
        "train/optim.py",
        'group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor',
        'group["lr"] = group["lr"] * factor',
        "train/test_optim.py::test_the_rate_is_the_peak_times_the_factor_however_often_it_is_set",
    ),
    # Evaluation
    Mutant(
        "dropout acts in the evaluation",
        "evaluate/loss.py",
        "task.eval()",
        "task.train()",
        "evaluate/test_held_out_loss.py::test_dropout_is_off_and_every_modules_own_mode_comes_back",
    ),
    Mutant(
        "modules are not put back as they were",
        "evaluate/loss.py",
        "module.training = training",
        "module.training = True",
        "evaluate/test_held_out_loss.py",
    ),
    Mutant(
        "the held-out loss is a mean of batch means",
        "evaluate/loss.py",
        "return HeldOut(summed.total.item() / items,",
        "batches = micro_batches(list(examples), layout, **ranks)\n"
        '    means = [found.total.item() / batch["weights"].sum().item() for found, (_, batch) in zip(losses, batches)]\n'
        "    return HeldOut(sum(means) / len(means),",
        "evaluate/test_held_out_loss.py::test_it_is_the_sum_over_all_rows_divided_once",
    ),
    Mutant(
        "the best step is the one of the highest loss",
        "train/loop.py",
        "progress.kept_loss is None or loss < progress.kept_loss",
        "progress.kept_loss is None or loss > progress.kept_loss",
        "laws/test_resume.py::test_with_keep_best_the_result_is_the_adapter_of_the_lowest_held_out_loss",
    ),
    # Checkpoints and runs
    Mutant(
        "the optimizer begins anew in a resumed run",
        "train/checkpoint.py",
        '    restore_optimizer(optimizer, parameters, tensors, state["optimizer"])\n    if "snapshot"',
        '    if "snapshot"',
        "train/test_checkpoint.py::test_restored_it_goes_on_bit_for_bit",
    ),
    Mutant(
        "bytes that changed in a checkpoint are not noticed",
        "train/checkpoint.py",
        "if hashlib.sha256(file.read_bytes()).hexdigest() != digest:",
        "if False:",
        "train/test_checkpoint.py::test_a_damaged_newest_is_named_and_passed_over",
    ),
    Mutant(
        "what was written is not read back",
        "train/checkpoint.py",
        "        check(draft)\n",
        "",
        "train/test_checkpoint.py::test_what_the_disk_gives_back_otherwise_is_not_saved_and_nothing_has_changed",
    ),
    Mutant(
        "a draft has its name before it is on the disk",
        "durable.py",
        "        stream.flush()\n        sync(stream.fileno())\n",
        "        stream.flush()\n",
        "train/test_checkpoint.py::test_every_file_and_name_is_on_the_disk_before_a_step_counts_as_saved",
    ),
    Mutant(
        "a step is saved before its name is on the disk",
        "train/checkpoint.py",
        "    sync_path(folder.parent)\n",
        "",
        "train/test_checkpoint.py::test_every_file_and_name_is_on_the_disk_before_a_step_counts_as_saved",
    ),
    Mutant(
        "rotation removes the newest",
        "train/checkpoint.py",
        "    for folder in reversed(_by_step(checkpoints)):\n        if whole < keep:",
        "    for folder in _by_step(checkpoints):\n        if whole < keep:",
        "train/test_checkpoint.py::test_rotation_keeps_the_newest_by_the_number_of_the_step_whatever_the_clock_says",
    ),
    Mutant(
        "rotation removes the best",
        "train/checkpoint.py",
        "elif folder.name != folder_name(spare or 0):",
        "else:",
        "laws/test_resume.py::test_the_best_checkpoint_outlives_the_rotation",
    ),
    Mutant(
        "the start that is taken off is lost in a resumed run",
        "train/checkpoint.py",
        "if factors.A.shape[-2] == 2 * r:",
        "if False:",
        "train/test_checkpoint.py::test_the_start_that_is_taken_off_comes_back_with_the_factors",
    ),
    Mutant(
        "a changed recipe is resumed",
        "runs/resume.py",
        "    if refused:\n",
        "    if False:\n",
        "laws/test_resume.py::test_a_changed_recipe_is_refused_by_name_and_changes_no_file",
    ),
    Mutant(
        "other rows are resumed",
        "runs/resume.py",
        '"data.train": fingerprint(run.rows.train),',
        '"data.train": "",',
        "laws/test_resume.py::test_other_rows_are_refused",
    ),
    Mutant(
        "no lock is taken",
        "runs/lock.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "",
        "laws/test_run_folder.py::test_a_folder_another_run_writes_to_is_refused",
    ),
    Mutant(
        "started again for want of memory, the forwards are as large as before",
        "runs/train.py",
        "    if shortage:\n        progress.layout",
        "    if False:\n        progress.layout",
        "laws/test_less_memory.py::test_where_others_wait_in_a_forward_all_leave_and_start_again",
    ),
    # Merging
    Mutant(
        "a merge rounds twice",
        "export/merged.py",
        "merged[rows] = exact.to(dtype)",
        "merged[rows] = exact.to(torch.bfloat16).to(dtype)",
        "export/test_merged.py::test_a_chosen_dtype_holds_for_all_weights_and_stands_in_the_config"
        " export/test_merged.py::test_a_merged_model_answers_as_base_and_adapter",
    ),
    Mutant(
        "a merge gives all layers the same scale",
        "export/merged.py",
        "factors, scale = rows_of(adapter.layers[part.path], part.rows), adapter.config.at(part.path).scale",
        "factors, scale = rows_of(adapter.layers[part.path], part.rows), adapter.config.scale",
        "export/test_merged.py::test_a_merged_model_answers_as_base_and_adapter",
    ),
    Mutant(
        "every merge is proved",
        "export/proof.py",
        "if not proof.unexplained <= allowed:  # also for NaN",
        "if False:",
        "export/test_proof.py::test_a_wrong_merge_is_not_proved"
        " export/test_proof.py::test_a_fold_that_does_not_act_as_its_layer_is_found",
    ),
    Mutant(
        "an adapter is merged twice",
        "export/merged.py",
        'if adapter.digest() in [entry["sha256"] for entry in merge_record(base_folder)["adapters"]]:',
        "if False:",
        "export/test_merged.py::test_merging_the_same_adapter_twice_is_refused",
    ),
    # Code from elsewhere
    Mutant(
        "code that was not named is run",
        "models/trust.py",
        "if all(found.commit != (revision or digest) for found in named):",
        "if not named:",
        "cli/test_trust_remote_code.py::test_what_was_not_named_does_not_run",
    ),
    Mutant(
        "what is named in part is trusted",
        "models/trust.py",
        'COMMIT = re.compile(r"[0-9a-f]{40}")',
        'COMMIT = re.compile(r"[0-9a-f]+")',
        "cli/test_trust_remote_code.py::test_a_flag_without_a_full_commit_is_exit_2",
    ),
    Mutant(
        "a base that is trusted names code of another repository",
        "models/trust.py",
        "    _refuse_code_elsewhere(folder)\n    trusted",
        "    trusted",
        "cli/test_trust_remote_code.py::test_what_else_it_asks_for_stays_refused",
    ),
    Mutant(
        "trust outlasts its command",
        "cli/options.py",
        "    trust(flags or [])",
        "    flags and trust(flags)",
        "cli/test_trust_remote_code.py::test_it_holds_for_one_command",
    ),
    # Recipes and errors
    Mutant(
        "keys that no recipe has are ignored",
        "recipe/schema.py",
        'ConfigDict(extra="forbid", frozen',
        'ConfigDict(extra="ignore", frozen',
        "cli/test_commands.py::test_an_unknown_key_is_one_block_with_its_place",
    ),
    Mutant(
        "`--set` shows a secret",
        "recipe/document.py",
        'hidden = any(map(looks_secret, name.split("."))) or bool(SECRET_TEXT.search(text))',
        "hidden = False",
        "recipe/test_reader.py::test_a_secret_is_refused_and_never_echoed_nor_a_line_that_holds_one",
    ),
    Mutant(
        "a quoted line shows a secret",
        "recipe/document.py",
        "    if SECRET_TEXT.search(text):\n",
        "    if False:\n",
        "recipe/test_reader.py",
    ),
    Mutant(
        "a diverged run has the exit code of a crash",
        "errors.py",
        "    code = 6\n",
        "    code = 1\n",
        "cli/test_commands.py::test_an_adapter_that_does_nothing_is_exit_6",
    ),
    # Adapters as values, and whose base they are of
    Mutant(
        "a sum of DoRAs forgets what each does to the rows",
        "lora/gains.py",
        "layers[path] = Factors(factors.A, (gains[path].unsqueeze(1) * factors.B.double()).float())",
        "layers[path] = Factors(factors.A, factors.B)",
        "lora/test_algebra.py::test_doras_and_plain_adapters_on_the_same_modules_are_added_exactly",
    ),
    Mutant(
        "the gains of weighted DoRAs are added without their weights",
        "lora/algebra.py",
        "found[path] = found.get(path, 1.0) + term.weight * (gain - 1)",
        "found[path] = found.get(path, 1.0) + (gain - 1)",
        "lora/test_algebra.py::test_doras_and_plain_adapters_on_the_same_modules_are_added_exactly",
    ),
    Mutant(
        "a kind of module is left out of the base's fingerprint",
        "lora/base_files.py",
        "taken = (kind[n * len(kind) // each] for kind in kinds.values() for n in range(each))",
        "taken = (kind[n * len(kind) // each] for kind in [*kinds.values()][:-1] for n in range(each))",
        "lora/test_base_files.py::test_every_kind_of_tensor_is_sampled_over_the_whole_depth",
    ),
    Mutant(
        "an export looks at no base",
        "export/table.py",
        "differences = on_its_base(order)",
        "differences = ()",
        "models/test_identity.py::test_every_command_refuses_another_base_of_the_same_shape_and_names_its_tensors",
    ),
    Mutant(
        "ranks are suggested without the alpha that keeps their scale",
        "runs/inspect.py",
        'return float(f"{config.scale * (sqrt(r) if config.use_rslora else r):.6g}")',
        "return config.lora_alpha",
        "cli/test_adapter_commands.py::test_the_suggested_ranks_can_be_pasted_into_a_recipe_and_keep_what_they_say",
    ),
    Mutant(
        "an extracted adapter lacks the biases it speaks of",
        "export/extract_beside.py",
        'extras[path] = {"bias": _of_one_shape(before, f"{path}.bias", theirs)}',
        'extras[path] = {"bias": _of_one_shape(before, f"{path}.bias", own)}',
        "export/test_extract.py::test_an_adapter_that_holds_all_that_changed_is_the_tuned_model",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only the faults whose name holds this")
    parser.add_argument("--list", action="store_true", help="name the faults, and run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many faults at once")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not options.names or any(name in mutant.name for name in options.names)]
    try:
        if not chosen:
            raise Unusable("no fault has such a name; `--list` names them all")
        if problems := stale(chosen):
            raise Unusable("\n".join(problems))
        if options.list:
            print("\n".join(f"{mutant.path}: {mutant.name}" for mutant in chosen))
            return
        survivors = [outcome for outcome in score(chosen, options.jobs) if not outcome.killed_by]
    except Unusable as error:
        sys.exit(f"error: {error}")
    print(f"score: {len(chosen) - len(survivors)}/{len(chosen)}")
    sys.exit(1 if survivors else 0)


def stale(mutants: Sequence[Mutant]) -> list[str]:
    """What tells the list from the code: a text that does not stand there once, or changes nothing."""
    found = []
    for mutant in mutants:
        times = (ROOT / mutant.path).read_text(encoding="utf-8").count(mutant.text)
        if times != 1 or mutant.text == mutant.planted:
            found.append(f"the fault `{mutant.name}` is stale: its text stands {times} times in {mutant.path}")
    return found


def score(mutants: Sequence[Mutant], jobs: int) -> Iterator[Outcome]:
    """Each fault, as soon as its turn is over; told on the way. Raises Unusable where the tests fail without any."""
    _warm_up()
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.selection))
    waiting, trials = list(reversed(mutants)), dict[int, Trial]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        copies = [_copy(Path(temporary, str(number))) for number in range(jobs)]
        print(f"{len(tests)} selections of tests must pass without a fault …", flush=True)
        trial = _started(copies[0], tests, seconds=SECONDS * len(tests))
        if failure := _verdict(trial, os.waitpid(trial.pid, 0)[1]):
            raise Unusable(f"without a fault, {failure} fails:\n{trial.said[-4000:]}")
        try:
            while waiting or trials:
                while waiting and copies:
                    trial = _planted(waiting.pop(), copies.pop())
                    trials[trial.pid] = trial
                pid, status = os.wait()
                trial = trials.pop(pid)
                copies.append(trial.copy)
                yield _told(Outcome(trial.mutant, _verdict(trial, status), time.monotonic() - trial.began))
        finally:
            for pid in trials:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


@dataclass(frozen=True)
class Trial:
    """A process that runs tests in a copy; what it says goes to a file beside the copy."""

    pid: int
    copy: Path
    mutant: Mutant | None
    began: float

    @property
    def said(self) -> str:
        return _log(self.copy).read_text(encoding="utf-8", errors="replace")


def _warm_up() -> None:
    """Import once what most tests need: the processes that run them are forked from this one."""
    os.environ.update(OFFLINE)
    for name in WARM:
        importlib.import_module(name)
    gc.freeze()


def _copy(folder: Path) -> Path:
    folder.mkdir()
    for source in (ROOT / name for name in COPIED):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder)
    return folder


def _planted(mutant: Mutant, copy: Path) -> Trial:
    """The tests of a fault, in a copy that has this one alone."""
    for path in {other.path for other in MUTANTS}:
        shutil.copyfile(ROOT / path, copy / path)
    healthy = (copy / mutant.path).read_text(encoding="utf-8")
    (copy / mutant.path).write_text(healthy.replace(mutant.text, mutant.planted), encoding="utf-8")
    return _started(copy, mutant.selection, mutant=mutant, seconds=SECONDS)


def _started(copy: Path, tests: Sequence[str], *, seconds: int, mutant: Mutant | None = None) -> Trial:
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        _run_tests(copy, tests, seconds)
    return Trial(pid, copy, mutant, time.monotonic())


def _run_tests(copy: Path, tests: Sequence[str], seconds: int) -> NoReturn:
    code = UNUSABLE
    try:
        signal.alarm(seconds)  # which ends the process
        descriptor = os.open(_log(copy), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        # no bytecode: a file that changes and changes back within a second would not be compiled anew
        sys.dont_write_bytecode = True
        os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
        code = pytest.main(
            ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "--basetemp", f"{copy}-tmp", *tests]
        )
    except BaseException:  # of pytest itself: the log says so
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _log(copy: Path) -> Path:
    return copy.with_suffix(".log")


def _verdict(trial: Trial, status: int) -> str | None:
    """The first test that failed, None where all passed."""
    code, name = os.waitstatus_to_exitcode(status), trial.mutant.name if trial.mutant else "no fault"
    if code == -signal.SIGALRM:
        raise Unusable(f"the tests of `{name}` do not end")
    if code not in (FAILED, PASSED):
        raise Unusable(f"the tests of `{name}` could not run:\n{trial.said[-4000:]}")
    return _first_failure(trial.said) if code == FAILED else None


def _told(outcome: Outcome) -> Outcome:
    verdict = f"killed by {outcome.killed_by}" if outcome.killed_by else "SURVIVED"
    print(f"{outcome.seconds:5.1f} s  {outcome.mutant.name}\n         {verdict}", flush=True)
    return outcome


def _first_failure(output: str) -> str:
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", output, re.MULTILINE)
    return found.group(1) if found else "a test"


if __name__ == "__main__":
    main()
