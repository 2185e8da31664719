"""GGUF as llama.cpp reads it: its architectures, its names of tensors, and its order of the rows of q and k.

    model.layers.3.self_attn.q_proj  ->  blk.3.attn_q.weight

Where llama.cpp turns neighbours by the rotary embedding, and transformers turns halves, the rows of each head's q and k
stand in pairs: row i beside row i + d/2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from lora_cli.errors import ModelError, Problem, first_line
from lora_cli.export.runtimes import LLAMA_CPP_KINDS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUFFIX = ".gguf"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a model of transformers; `paired` where the rows of its q and k stand in pairs."""

    name: str
    paired: bool = False


# Others than these kinds reorder fused weights (Falcon, GPT-NeoX) or stack experts on the way
ARCHITECTURES: Mapping[str, Architecture] = {kind: Architecture(kind) for kind in LLAMA_CPP_KINDS} | {
    "llama": Architecture("llama", paired=True),
    "mistral": Architecture("llama", paired=True),
    "gemma3_text": Architecture("gemma3"),
}


def architecture_of(config: "PretrainedConfig", where: Path) -> Architecture:
    """Raises ModelError for a model whose GGUF form is not known here."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        what = f"how llama.cpp stores a `{config.model_type}` is not known here; known are {known}"
        fix = "`lora merge` it, and convert the merged model with llama.cpp's own convert_hf_to_gguf.py"
        raise ModelError(Problem(what, where=str(where), fix=fix))
    return found


def tensor_names(config: "PretrainedConfig", where: Path) -> Callable[[str], str | None]:
    """(name of a module or parameter, without `.weight`) -> its name in a GGUF file; None for what has none."""
    gguf, name = gguf_package(), architecture_of(config, where).name
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers).get_name


def paired_heads(config: "PretrainedConfig", where: Path, path: str) -> int | None:
    """The number of heads by which the rows of a projection are put in pairs; None where they stay in order."""
    if not architecture_of(config, where).paired:
        return None
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = {"q_proj": config.num_attention_heads, "k_proj": keys}
    return heads.get(path.rpartition(".")[2])


def in_pairs(weight: Tensor, heads: int | None) -> Tensor:
    """[out, …]: of each head's rows 0 … d-1, the order 0, d/2, 1, d/2 + 1 …"""
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def in_halves(weight: Tensor, heads: int | None) -> Tensor:
    """The reverse of `in_pairs`."""
    if heads is None:
        return weight
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def gguf_package() -> ModuleType:
    """The `gguf` library, which is an extra."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(Problem("GGUF files need the `gguf` package", fix="pip install 'lora-cli[gguf]'")) from error
    return gguf


def read_gguf(file: Path):
    """A reader over a file of ours. Raises OSError for one that does not read back."""
    try:
        return gguf_package().GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise OSError(f"what was written can't be read back: {first_line(error)}") from error
