"""Model and tokenizer in memory: frozen, on one device, quantised or not. What is `auto` is decided here."""

import logging
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_cli.data.examples import Examples
from lora_cli.data.types import Example
from lora_cli.errors import ModelError, Problem, SafetyError, UserError, is_out_of_memory, said
from lora_cli.kernels.products import has_bfloat16
from lora_cli.lora.base_files import weight_files
from lora_cli.lora.inject import linears
from lora_cli.lora.weights import is_quantised, weights_of
from lora_cli.models.base import Base, quantised_on_disk, refuse_foreign_code, refuse_twice
from lora_cli.models.heads import SUFFIX, Head, configure, head_modules, may_be_new, refuse_encoder, start
from lora_cli.models.quiet import quiet_transformers
from lora_cli.models.trust import may_run

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASE_DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "hidden_dropout",
    "hidden_dropout_prob",
    "dropout",
    "activation_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "classifier_dropout",
    "classifier_dropout_prob",
    "seq_classif_dropout",
    "cls_dropout",
    "pooler_dropout",
)
FOREIGN_CODE = "trust_remote_code"  # what transformers asks for
ATTENTIONS = {"auto": None, "eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2", "flex": "flex_attention"}


def default_device(local_rank: int = 0) -> torch.device:
    """This process's accelerator, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, float32 otherwise."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def load_model(
    base: Base,
    *,
    dtype: torch.dtype,
    quantize: str = "none",
    attention: str = "auto",
    device: torch.device | str = "cpu",
    head: Head | None = None,
) -> "PreTrainedModel":
    """The base in evaluation mode, with no parameter trainable but those of a head that is new.

    Raises ModelError for weights that don't fit the config, and SafetyError for pickled ones.
    """
    quiet_transformers()
    refuse_twice(base.folder, quantize)
    weight_files(base.folder)  # transformers would take a pickle that an index of safetensors names
    left_out = head_modules(skeleton(base.folder, head)) if head and quantize != "none" else None
    try:
        model, info = _auto_class(head).from_pretrained(
            base.folder,
            config=_config(base, head),
            dtype=dtype,
            attn_implementation=ATTENTIONS[attention],
            quantization_config=_quantization(quantize, dtype, left_out),
            device_map={"": device} if quantize != "none" or torch.device(device).type != "cpu" else None,
            use_safetensors=True,
            trust_remote_code=may_run(base.folder),
            output_loading_info=True,
            ignore_mismatched_sizes=head is not None,  # of a head for other labels
        )
    except UserError:
        raise
    except Exception as error:  # whatever the libraries make of foreign files
        if is_out_of_memory(error):
            raise
        raise _of_foreign_file(
            f"the base can't be loaded: {said(error)}", base.folder, error, _fix(error, head)
        ) from error
    model.requires_grad_(False)
    if quantised_on_disk(base.folder) == "bitsandbytes":
        _to(model, dtype)
    _check_complete(base, model, info, head)
    if head:
        model.config.pad_token_id = head.pad_token_id  # a decoder's last token is the last that is not this one
    return model.eval()


def _to(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """What is not quantised, in the type that was asked for: transformers leaves some of it in that of bitsandbytes' files."""
    for module in model.modules():
        for parameter in () if is_quantised(module) else module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)


def skeleton(folder: Path, head: Head | None = None) -> "PreTrainedModel":
    """The model's modules without any weights, on the meta device. Raises ModelError for a config that makes none."""
    from transformers import AutoConfig

    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=may_run(folder))
        if head is None:
            refuse_encoder(config, folder)
        return without_weights(config, head, own_code=may_run(folder))
    except UserError:
        raise
    except Exception as error:
        what = f"the base can't be built from its config: {said(error)}"
        raise _of_foreign_file(what, folder / "config.json", error, _fix(error, head)) from error


def without_weights(
    config: "PretrainedConfig", head: Head | None = None, *, own_code: bool = False
) -> "PreTrainedModel":
    """The modules that a config describes, on the meta device; of a head, the parameters count as new.

    `own_code` runs that which the config names, and is for a base that the user trusts.
    """
    if head:
        configure(config, head)
    with torch.device("meta"):
        model = _auto_class(head).from_config(config, trust_remote_code=own_code).requires_grad_(False)
    for path in head_modules(model) if head else ():
        model.get_submodule(path).requires_grad_(True)
    return model


def load_tokenizer(folder: Path, *, writes: bool = True) -> "PreTrainedTokenizerBase":
    """The tokenizer of a base or of a run folder; of a model that `writes` answers, it must name an end token.

    Padding is masked by position, so pad = eos does no harm.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    refuse_foreign_code(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the libraries make of foreign files
        if is_out_of_memory(error):
            raise
        fix = "copy the tokenizer's files beside the weights"
        raise _of_foreign_file(f"the tokenizer can't be loaded: {said(error)}", folder, error, fix) from error
    if writes and tokenizer.eos_token_id is None:
        raise ModelError(
            Problem(
                "the tokenizer names no end token, so no answer could learn to stop",
                where=str(folder),
                fix="set `eos_token` in tokenizer_config.json",
            )
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            what = "the tokenizer names neither a padding token nor an end token, so rows can't be batched"
            fix = "set `pad_token` in tokenizer_config.json"
            raise ModelError(Problem(what, where=str(folder), fix=fix))
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_folder(run: Path | None, base: Path) -> Path:
    """Whose tokenizer counts: the run folder's where it has one, for that is what was trained with, else the base's."""
    return run if run is not None and (run / "tokenizer_config.json").is_file() else base


def check_vocabulary(model: "PreTrainedModel", examples: Sequence[Example]) -> None:
    """Raise ModelError for a token that the model has no embedding for, and for a row longer than its positions."""
    found = Examples.of(examples)
    highest, where = max(
        ((int(b.tokens.max()), b.place + b.example_of(b.tokens.argmax())) for b in found.blocks()), key=itemgetter(0)
    )
    longest = found[int(found.lengths.argmax())]
    problems = []
    if highest >= (size := model.get_input_embeddings().num_embeddings):
        problems.append(
            Problem(
                f"the tokenizer makes token {highest}, and the model has embeddings for 0 to {size - 1}",
                where=str(found[where].row),
                fix="use the tokenizer that belongs to the model: copy its files into the model's folder",
            )
        )
    positions = _positions(model)
    if positions and (length := len(longest.input_ids)) > positions:
        problems.append(
            Problem(
                f"a row has {length:,} tokens, and the model has positions for {positions:,}",
                where=str(longest.row),
                fix=f"set `data.max_length: {positions}`",
            )
        )
    if problems:
        raise ModelError(*problems)


def head_paths(model: "PreTrainedModel") -> set[str]:
    """The paths of the output projection, or of a classifier's head: letters and `all-linear` leave them out."""
    if type(model).__name__.endswith(SUFFIX):
        own = tuple(head_modules(model))
        return {path for path, _ in model.named_modules() if path.partition(".")[0] in own}
    head = model.get_output_embeddings()
    return {path for path, module in model.named_modules() if module is head}


def by_name_alone(model: "PreTrainedModel") -> set[str]:
    """What letters and `all-linear` leave out and an explicit name reaches: heads, and all that is no linear layer."""
    return head_paths(model) | (set(weights_of(model)) - set(linears(model)))


def _auto_class(head: Head | None):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if head else AutoModelForCausalLM


def _positions(model: "PreTrainedModel") -> int | None:
    """The tokens of the longest row; RoBERTa's first positions are those of its padding."""
    positions = getattr(model.config, "max_position_embeddings", None)
    offset = (
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    )
    return positions and positions - next(offset, 0)


def _config(base: Base, head: Head | None):
    """The base's config with its own dropout off: `lora.dropout` is the only one, and 0 of it is none."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=may_run(base.folder))
    if head:
        configure(config, head)
    else:
        refuse_encoder(config, base.folder)
    for name in BASE_DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def _quantization(quantize: str, dtype: torch.dtype, left_out: list[str] | None):
    if quantize == "none":
        return None
    from transformers import BitsAndBytesConfig

    # LLM.int8 and bitsandbytes log a line for every layer and call on a CPU
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=left_out,  # of both kinds
    )


def _check_complete(base: Base, model: "PreTrainedModel", info: dict, head: Head | None) -> None:
    """Raise ModelError for weights that are not there; those of a head may be, and are started where no adapter has them."""
    missing = {str(key) for key in info.get("missing_keys") or ()}
    mismatched = {str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys") or ()}
    lacking = missing | mismatched
    known = set() if head is None else {name for name in lacking if may_be_new(model, name)}
    if head and head.brought is not None:
        known &= head.brought
    problems = [
        Problem(
            f"the base has {len(found)} {text}, first {min(found)}",
            where=str(base.folder),
            fix="download it again, or take one whose config and weights belong together",
        )
        for found, text in (
            (missing - known, "weights missing"),
            (mismatched - known, "weights of another shape than its config says"),
        )
        if found
    ]
    if problems:
        raise ModelError(*problems)
    if head and head.brought is None:
        start(model, lacking, head.seed)


def _of_foreign_file(what: str, where: Path, error: Exception, fix: str) -> UserError:
    if FOREIGN_CODE in str(error):
        what = "it brings its own code, and transformers can't load it without"
        return SafetyError(
            Problem(what, where=str(where), fix="use a model that transformers has; foreign code is never run")
        )
    return ModelError(Problem(what, where=str(where), fix=fix))


def _fix(error: Exception, head: Head | None) -> str:
    if head and "Unrecognized configuration class" in str(error):
        return "transformers has no classifier of this kind: choose a base such as BERT, RoBERTa, Llama or Qwen"
    text = str(error).lower()
    if "flash" in text or "flex" in text:
        return "use `model.attention: sdpa`, or install what the message names"
    if isinstance(error, ImportError):
        return "install what the message names, or give the 16-bit original of the base"
    return "check that the folder is a causal language model with safetensors, complete and undamaged"
