"""A base that is quantised on disk, as the model in 16 bits that it stands for: what an adapter can be merged into.

Made once, into the user's cache folder. What each layer gives for its weight is what it multiplies with, so that the
merged model answers as the quantised base with the adapter did, to the rounding of 16 bits.
"""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_cli.data.cache import made_once, user_cache
from lora_cli.errors import ModelError, Problem
from lora_cli.export.files import copy_side_files, dtype_name
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.weights import is_quantised, weights_of
from lora_cli.models.base import Base, quantised_on_disk, read_config
from lora_cli.models.heads import head_in
from lora_cli.models.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def in_16_bits(base: Base, adapter: Adapter, *, allow_base_mismatch: bool = False) -> tuple[Base, Adapter]:
    """Both as they are; of a base that is quantised on disk what it stands for, and the adapter as one of that.

    Raises ModelError where the adapter was trained on another base, unless that is allowed.
    """
    method = quantised_on_disk(base.folder)
    if method is None:
        return base, adapter
    log.info("the base is quantised on disk (%s): the merge goes into the weights that it stands for", method)
    adapter.check_base(fingerprint(base.folder), base.folder, allow=allow_base_mismatch)
    plain = dequantised(base)
    return plain, replace(adapter, base=fingerprint(plain.folder))


def dequantised(base: Base) -> Base:
    """The same base without `quantization_config`; float16, which keeps three bits more than bfloat16, or float32.

    Raises ModelError for a storage that gives no weight back.
    """
    config = read_config(base.folder)
    own = config.get("dtype") or config.get("torch_dtype")
    dtype = torch.float32 if own == "float32" else torch.float16
    name = f"{base.folder.name}-{fingerprint(base.folder).short}-{dtype_name(dtype)}"
    return Base(base.name, made_once(user_cache() / "dequantised" / name, lambda draft: _write(base, draft, dtype)))


def _write(base: Base, folder: Path, dtype: torch.dtype) -> None:
    log.info("dequantising %s once", base.name)
    model = load_model(base, dtype=dtype, head=head_in(base))
    try:
        for path, weight in weights_of(model).items():
            if is_quantised(weight.module):
                model.set_submodule(path, _plain(weight.module, weight.dense().to("cpu", dtype), dtype))
    except ValueError as error:
        fix = "give the 16-bit original with `--base` and `--allow-base-mismatch`"
        raise ModelError(Problem(f"the base gives no weight back: {error}", str(base.folder), fix=fix)) from error
    _without_quantisation(model).save_pretrained(folder)
    copy_side_files(base.folder, folder)


def _plain(layer: nn.Module, W: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    plain = nn.Linear(*W.shape[::-1], bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(W.contiguous(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to("cpu", dtype), requires_grad=False)
    return plain


def _without_quantisation(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same weights in a model that has never been quantised: transformers writes what it remembers of loading."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain
