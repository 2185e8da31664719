"""A GGUF file as a base: dequantised once into a cached folder of safetensors, and a plain model from then on."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.data.cache import made_once, user_cache
from lora_cli.errors import ModelError, Problem, first_line
from lora_cli.models.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

HASHED_BYTES = 4 * 2**20
VERSION = 2  # of what is made from a file: raise it when that changes


def converted_folder(file: Path) -> Path:
    """The folder of safetensors, config and tokenizer made from a GGUF file; made now if it is not there yet.

    transformers reads the file; what it marks as quantised is plain float weights by then, and is saved as such.
    """
    folder = user_cache() / "gguf" / f"{file.stem}-{_content_key(file)}"
    return made_once(folder, lambda draft: _convert(file, draft))


def load_gguf(file: Path, config: "PretrainedConfig", dtype: "torch.dtype") -> "PreTrainedModel":
    """The weights of a GGUF file in a model of this config, in evaluation mode. Raises ModelError for one that can't be read."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    quiet_transformers()
    if config.model_type == "mistral":  # a Llama to llama.cpp, and to transformers as it reads its files
        config = LlamaConfig.from_dict(config.to_dict() | {"model_type": "llama"})
    try:
        with _alone(file) as folder:
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file.name, config=config, dtype=dtype, trust_remote_code=False
            )
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
        raise ModelError(Problem(f"transformers can't read it: {first_line(error)}", where=str(file))) from error
    return model.eval()


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A folder with nothing but the file, and silence: transformers would load an adapter that lies beside the file, and
    shows a progress bar that nothing turns off."""
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def _convert(file: Path, folder: Path) -> None:
    log.info("converting %s once", file.name)
    quiet_transformers()
    with _alone(file) as alone:
        model, tokenizer = _read(alone, file)
    if hasattr(model.config, "quantization_config"):  # since transformers 5.18
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    _forget_origin(folder / "tokenizer_config.json")


def _read(folder: Path, file: Path):
    """Model and tokenizer of the one GGUF file in `folder`; `file` is what the user knows it by."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = _reader(file)
    source = {"pretrained_model_name_or_path": str(folder), "gguf_file": file.name, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=_float_type(reader))
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise ModelError(
            Problem(
                f"transformers can't read this GGUF file: {first_line(error)}",
                where=str(file),
                fix="give the model's folder or hub id as `model.base`",
            )
        ) from error
    _name_special_tokens(tokenizer, reader)
    return model, tokenizer


def _name_special_tokens(tokenizer, reader) -> None:
    """The special tokens that the file names by number and that transformers before 5.18 left out or mistook."""
    for role in ("bos", "eos", "unk"):
        field = reader.fields.get(f"tokenizer.ggml.{'unknown' if role == 'unk' else role}_token_id")
        if field is not None and getattr(tokenizer, f"{role}_token_id") != (number := int(field.contents())):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(number))


def _reader(file: Path):
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            Problem("reading a GGUF file needs the `gguf` package", where=str(file), fix="pip install 'lora-cli[gguf]'")
        ) from error
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        what = f"it is no GGUF file, or damaged: {first_line(error)}"
        raise ModelError(Problem(what, where=str(file), fix="download it again")) from error


def _float_type(reader):
    """The type that holds the file's matrices best: their own where they are floats; float16 for quantised ones, which
    keeps three bits more of them than bfloat16."""
    import torch

    found = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    floats = {"F32": torch.float32, "BF16": torch.bfloat16}
    return next((dtype for name, dtype in floats.items() if name in found), torch.float16)


def _forget_origin(file: Path) -> None:
    """Keys that describe this machine's copy, and the class that any reader of a tokenizer.json can load."""
    config = json.loads(file.read_text())
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2))


def _content_key(file: Path) -> str:
    """A hash of the size and both ends: a GGUF's header, with all names and settings, stands at the front."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{VERSION} {size}".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(HASHED_BYTES))
        stream.seek(max(0, size - HASHED_BYTES))
        digest.update(stream.read(HASHED_BYTES))
    return digest.hexdigest()[:16]
