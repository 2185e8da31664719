"""Base + adapter as one GGUF file, for llama.cpp, Ollama and what is built on them.

The merge is made in float32 and rounded once, as it is written. Then transformers, which has a reader of its own for
these files, loads it anew, and its answers are held against base + adapter.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lora_cli.durable import DRAFT
from lora_cli.errors import ModelError, Problem
from lora_cli.export.files import DTYPES, Progress, dtype_name, read_weight
from lora_cli.export.gguf import SUFFIX, architecture_of, gguf_package, in_pairs, paired_heads, tensor_names
from lora_cli.export.gguf_tokenizer import write_tokenizer
from lora_cli.export.merged import merge
from lora_cli.export.names import names_in_files
from lora_cli.export.order import ExportReport, Order, chosen_grid
from lora_cli.export.proof import compute_dtype, prove_file
from lora_cli.export.staging import need_space, refuse_output, staged_file
from lora_cli.lora.base_files import StoredTensor, stored_tensors
from lora_cli.lora.inject import linears
from lora_cli.lora.weights import storage_of
from lora_cli.models.base import Base
from lora_cli.models.load import skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "model.gguf"
# What llama.cpp calls the types of a file's matrices; vectors (norms, biases) are float32 in all of them
TYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
GEMMAS = ("gemma2", "gemma3_text")
BLOCK = 32  # numbers that share a scale in Q8_0
ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class _Piece:
    """One tensor of the file; `numbers` makes it, float32, in the order it has there."""

    name: str
    shape: tuple[int, ...]
    type: str
    numbers: Callable[[], Tensor]


def export_gguf(order: Order, progress: Progress | None = None) -> ExportReport:
    """One file, at `out` itself where that ends in .gguf, else in that folder."""
    base = order.known_base
    out = order.out if order.out.suffix == SUFFIX else order.out / FILE
    refuse_output(out)
    check_writable(skeleton(base.folder).config, base.folder)
    compute_dtype(base.folder, order.device)  # whether the proof has room, before the long part
    type_name = order.type or _own_type(base.folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    grid, choice = chosen_grid(order)
    with TemporaryDirectory(dir=out.parent, prefix=DRAFT) as work, staged_file(out) as draft:
        merged = merge(
            base.folder,
            order.adapter,
            Path(work) / "merged",
            dtype=torch.float32,
            base_name=base.name,
            tokenizer=order.folder,
            grid=grid,
            choice=choice,
            allow_base_mismatch=order.allow_base_mismatch,
            progress=progress,
        )
        tensors = write_model_file(merged.out, draft, type_name, base=base)
        rows = [list(row) for row in order.token_rows]
        proof = prove_file(
            base,
            order.adapter,
            draft,
            lambda weight: rounded(weight, type_name),
            rows,
            device=order.device,
            grid=grid,
        )
        size = draft.stat().st_size
    return ExportReport(
        out=out,
        format="gguf",
        tensors=tensors,
        bytes=size,
        stored=type_name,
        use=f"llama-cli -m {out}",
        proof=proof,
        grid=choice,
        base_differences=merged.base_differences,
    )


def check_writable(config: "PretrainedConfig", where: Path) -> None:
    """Raise ModelError for a model whose GGUF form can't be written, or not be proved, here."""
    architecture_of(config, where)
    strange = [kind for kind in _ropes(config) if kind not in ROPES]
    head_dim = _head_dim(config)
    if strange:
        what = f"its rotary embedding is scaled by `{strange[0]}`, which is not written here"
    elif config.model_type in GEMMAS and config.query_pre_attn_scalar != head_dim:
        what = (
            f"llama.cpp scales queries by its head size {head_dim}, and the config says {config.query_pre_attn_scalar}"
        )
    else:
        return
    fix = "`lora merge` it, and convert the merged model with llama.cpp's own convert_hf_to_gguf.py"
    raise ModelError(Problem(what, where=str(where / "config.json"), fix=fix))


def write_model_file(folder: Path, file: Path, type_name: str, *, base: Base) -> int:
    """A model folder as a GGUF file, one tensor in memory at a time; returns the number of tensors."""
    gguf, config = gguf_package(), skeleton(folder).config
    writer = gguf.GGUFWriter(file, architecture_of(config, folder).name)
    writer.add_type("model")
    writer.add_name(Path(base.name).stem)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if type_name == 'float32' else 'MOSTLY'}_{TYPES[type_name]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, config)
    write_tokenizer(writer, folder, config.vocab_size, base=base)
    pieces = list(_pieces(folder, TYPES[type_name]))
    sizes = [_announce(writer, piece) for piece in pieces]
    need_space(file.parent, sum(sizes))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for piece in pieces:
        writer.write_tensor_data(_stored(piece.numbers(), piece.type))
    writer.close()
    return len(pieces)


def rounded(weight: Tensor, type_name: str) -> Tensor:
    """[out, in] float32: a weight as a file of this type gives it back."""
    gguf = gguf_package()
    type = _type_of(tuple(weight.shape), TYPES[type_name])
    stored = _stored(weight.float().contiguous(), type)
    return torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[type]))


def _pieces(folder: Path, type: str) -> Iterator[_Piece]:
    model, stored = skeleton(folder), stored_tensors(folder)
    name_of, transposed = tensor_names(model.config, folder), _conv1d(model)
    for own, file_name in names_in_files(model, stored).items():
        module, _, kind = own.rpartition(".")
        name = name_of(module)
        if name is None:
            what = f"llama.cpp has no tensor for {own}"
            raise ModelError(Problem(what, where=str(folder), fix="`lora merge` it, and convert it with llama.cpp"))
        shape = stored[file_name].shape[::-1] if module in transposed and kind == "weight" else stored[file_name].shape
        make = partial(
            _numbers,
            stored[file_name],
            transposed=module in transposed and kind == "weight",
            heads=paired_heads(model.config, folder, module),
            plus=float(model.config.model_type in GEMMAS and module.endswith("norm")),
        )
        yield _Piece(f"{name}.{kind}", shape, _type_of(shape, type), make)
    if (factors := _rope_factors(model.config)) is not None:
        yield _Piece("rope_freqs.weight", tuple(factors.shape), "F32", lambda: factors)


def _numbers(source: StoredTensor, *, transposed: bool, heads: int | None, plus: float) -> Tensor:
    """Gemma's norms multiply by 1 + w in transformers, by w in llama.cpp: `plus` is that 1."""
    return in_pairs(read_weight(source, transposed=transposed).float(), heads).contiguous() + plus


def _conv1d(model: nn.Module) -> set[str]:
    return {path for path, module in linears(model).items() if storage_of(module).transposed}


def _type_of(shape: tuple[int, ...], type: str) -> str:
    """Vectors stay float32; blocks of 32 that don't fill a row are float16, as llama.cpp's converter has them."""
    if len(shape) == 1:
        return "F32"
    return "F16" if type == "Q8_0" and shape[-1] % BLOCK else type


def _stored(numbers: Tensor, type: str) -> np.ndarray:
    gguf = gguf_package()
    return gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType[type])


def _announce(writer, piece: _Piece) -> int:
    """Put a tensor's name, shape and type into the header; returns its bytes."""
    gguf = gguf_package()
    type = gguf.GGMLQuantizationType[piece.type]
    block, size = gguf.GGML_QUANT_SIZES[type]
    count = prod(piece.shape) // block * size
    writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), count, raw_dtype=type)
    return count


def _own_type(folder: Path) -> str:
    """The dtype of most of the base's bytes."""
    sizes: Counter[str] = Counter()
    for tensor in stored_tensors(folder).values():
        sizes[tensor.dtype] += tensor.end - tensor.start
    dtype = DTYPES.get(sizes.most_common(1)[0][0], torch.float16)
    return dtype_name(dtype) if dtype_name(dtype) in TYPES else "float32"


def _add_config(writer, config: "PretrainedConfig") -> None:
    """What llama.cpp must know of the model beside its weights."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    _add_rope(writer, config)
    if (window := getattr(config, "sliding_window", None)) and config.model_type in ("phi3", *GEMMAS):
        writer.add_sliding_window(window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_rope(writer, config: "PretrainedConfig") -> None:
    rope = _main_rope(config)
    writer.add_rope_dimension_count(int(_head_dim(config) * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)


def _rope_factors(config: "PretrainedConfig") -> Tensor | None:
    """[head_dim / 2]: by how much Llama 3 slows each frequency, as its inverse: what the file divides them by."""
    if _ropes(config) != ["llama3"]:
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, dim = _main_rope(config), _head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    return plain / slowed


def _main_rope(config: "PretrainedConfig") -> dict:
    """The settings of the rotary embedding; where layers differ, those of full attention."""
    rope = config.rope_parameters
    return rope if "rope_theta" in rope else rope["full_attention"]


def _ropes(config: "PretrainedConfig") -> list[str]:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return []
    return [rope["rope_type"]] if "rope_theta" in rope else sorted({kind["rope_type"] for kind in rope.values()})


def _head_dim(config: "PretrainedConfig") -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
