"""The proof that a merged model is its base with the adapter: both answer the same real rows, one after the other.

    P   base + adapter, the layers as they were trained
    R   the same model with every layer folded into its weight here, and rounded to the dtype it is stored in
    M   the merged folder, loaded anew by transformers

P to R is what storing costs, and is reported. R to M must be nothing but float32 noise: it is the whole way over the
disk, with names, shapes, transposes, ties and config. And each fold is held against its layer on random inputs in
float32, so that R itself is base + adapter. So a lost layer, a wrong scale or a swapped transpose fails however coarse
the dtype; with float32 stored and computed there is no rounding, and P and M themselves must agree.
Only one of the models is in memory at a time.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_cli.errors import DataError, ModelError, OutOfMemoryError, Problem
from lora_cli.export.files import DTYPES, dtype_name
from lora_cli.export.grid import NF4, ORIGINAL, TRAINED, Grid
from lora_cli.export.names import others, places, tables_in_files
from lora_cli.lora.adapter import Adapter, Factors, paths_of
from lora_cli.lora.base_files import stored_tensors
from lora_cli.lora.biases import remove_biases, trained_biases
from lora_cli.lora.config import of_expert
from lora_cli.lora.inject import disabled, generator_for, linears, lora_layers, remove
from lora_cli.lora.layer import LoRALayer, LoRAModule
from lora_cli.lora.switch import switched
from lora_cli.lora.tokens import ROWS, remove_tokens, trained_tokens
from lora_cli.lora.weights import CONVOLUTION, EMBEDDING, Weight, storage_of
from lora_cli.lora.whole import whole_modules
from lora_cli.models.base import Base
from lora_cli.models.gguf import load_gguf
from lora_cli.models.heads import CLASSIFIES, head_of
from lora_cli.models.load import default_device, load_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NOISE = 1e-4  # of the largest logit: some hundred float32 roundings in a row
TIES = 0.05  # of what rounding moved: sums in another order send a few weights to the other neighbour
MOST_POSITIONS = 256  # whose logits are kept: at 256k tokens of vocabulary, 256 MiB a model
MOST_ROWS = 16
MOST_TOKENS = 512  # of a row
LARGE_COST = 0.05  # storing costs more than this share of what the adapter does: worth a word

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and nobody is surprised.",
    "Question: what is the capital of France? Answer: Paris, on the river Seine.",
    "In 1969 two people walked on the Moon; it took them 8 days there and back.",
    "def mean(numbers):\n    return sum(numbers) / len(numbers)\n",
    '{"name": "Ada", "born": 1815, "known_for": ["the first program"]}',
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.",
    "SELECT name, COUNT(*) FROM orders GROUP BY name ORDER BY 2 DESC LIMIT 10;",
    "She opened the letter slowly, read it twice, and put it back without a word.",
)


@dataclass(frozen=True)
class Proof:
    """P against M. KL in nats a position; `adapter_kl` is base + adapter against the base alone, for scale.

    A position is a token, or a row where rows are classified.

    `unexplained` is R against M: the part of the difference that storing does not account for.
    """

    positions: int
    computed_in: str
    largest_logit_difference: float
    largest_logit: float
    kl: float
    adapter_kl: float
    same_top1: float
    unexplained: float
    position: str = "token"

    @property
    def storing_costs_much(self) -> bool:
        return self.kl > LARGE_COST * self.adapter_kl

    @property
    def sentence(self) -> str:
        return (
            f"base + adapter against merged on {self.positions} {self.position}s in {self.computed_in}: largest logit "
            f"difference {self.largest_logit_difference:.2g}, KL {self.kl:.2g} nats a {self.position} (the adapter's own: "
            f"{self.adapter_kl:.2g}), the same first choice at {self.same_top1:.1%}"
        )


def prove(
    base: Base,
    adapter: Adapter,
    merged_folder: Path,
    token_rows: list[list[int]],
    *,
    device: torch.device | str = "cpu",
    grid: Grid | None = None,
) -> Proof:
    """Compare base + adapter with the merged folder, on the last tokens of each row, where the contexts are long.

    With a grid, the base is what stands on it. Raises ModelError when more than storing tells them apart.
    """
    dtype, head = compute_dtype(base.folder, device), head_of(adapter)
    stored = _stored_dtypes(merged_folder, base.folder, adapter)
    whole = head and replace(head, brought=frozenset())  # nothing may be missing
    proof = _prove(
        base,
        adapter,
        token_rows,
        device=device,
        grid=grid,
        fold=lambda model: merge_in_memory(model, adapter, stored),
        load=lambda config: load_model(Base(base.name, merged_folder), dtype=dtype, device=device, head=whole),
    )
    if stored == dtype == torch.float32 and not proof.largest_logit_difference <= NOISE * proof.largest_logit:
        raise ModelError(_failed(proof.largest_logit_difference, NOISE * proof.largest_logit))
    return proof


def prove_file(
    base: Base,
    adapter: Adapter,
    file: Path,
    rounded: Callable[[Tensor], Tensor],
    token_rows: list[list[int]],
    *,
    device: torch.device | str = "cpu",
    grid: Grid | None = None,
) -> Proof:
    """As `prove`, for a GGUF file, whose weights [out, in] give back what `rounded` says; transformers reads it anew.

    The file's settings are not read here: it is loaded under the base's own config.
    """
    dtype = compute_dtype(base.folder, device)

    def fold(model: nn.Module) -> None:
        merge_in_memory(model, adapter, torch.float32)
        _round(model, rounded)

    def load(config: "PretrainedConfig") -> nn.Module:
        return load_gguf(file, config, dtype).to(device)

    return _prove(base, adapter, token_rows, device=device, grid=grid, fold=fold, load=load)


def _prove(
    base: Base,
    adapter: Adapter,
    token_rows: list[list[int]],
    *,
    device: torch.device | str,
    grid: Grid | None,
    fold: Callable[[nn.Module], None],
    load: Callable[["PretrainedConfig"], nn.Module],
) -> Proof:
    """P against M, and R against M: `fold` makes R of P, in place, and `load` reads M."""
    dtype, head = compute_dtype(base.folder, device), head_of(adapter)
    model = load_model(base, dtype=dtype, device=device, head=head)
    if grid:
        grid.put_on(model)
    rows = _bounded(token_rows, model, adapter)
    adapter.inject_into(model)
    expected = _logits(model, rows)
    with disabled(model):
        adapter_kl = _kl(expected, _logits(model, rows))
    fold(model)
    folded, config = _logits(model, rows), model.config
    del model
    found = _logits(load(config), rows)
    unexplained = _largest(found - folded)
    proof = _proof(expected, found, dtype, adapter_kl=adapter_kl, unexplained=unexplained, rows_count=head is not None)
    allowed = NOISE * proof.largest_logit + TIES * _largest(folded - expected)
    if not proof.unexplained <= allowed:  # also for NaN
        raise ModelError(_failed(proof.unexplained, allowed))
    return proof


def compare_grids(
    base: Base,
    adapter: Adapter,
    token_rows: list[list[int]],
    *,
    trained: torch.dtype,
    stored: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    held_out: Callable[[nn.Module], float] | None = None,
) -> tuple[Grid, dict[str, float], dict[str, float]]:
    """The grid that the adapter was trained on, KL(base(nf4) + adapter ‖ merge) of a merge on each grid, and the
    `held_out` loss of each, as of base(nf4) + adapter.

    `trained` is the dtype of the run, `stored` that of the merge; without it, each weight keeps its own.
    """
    head = head_of(adapter)
    model = load_model(base, dtype=trained, quantize="nf4", device=device, head=head)
    grid, rows = Grid.of(model, trained), _bounded(token_rows, model, adapter)
    adapter.inject_into(model)
    expected, costs, losses = _logits(model, rows), {}, {}
    if held_out:
        losses[TRAINED] = held_out(model)
    del model
    for name, on in {ORIGINAL: None, NF4: grid}.items():
        model = load_model(base, dtype=compute_dtype(base.folder, device), device=device, head=head)
        if on:
            on.put_on(model)
        adapter.inject_into(model)
        merge_in_memory(model, adapter, stored or _stored_dtypes(base.folder, base.folder, adapter))
        costs[name] = _kl(expected, _logits(model, rows))
        if held_out:
            losses[name] = held_out(model)
    return grid, costs, losses


def prove_adapter(
    base: Base,
    adapter: Adapter,
    written: Adapter,
    token_rows: list[list[int]],
    *,
    device: torch.device | str = "cpu",
) -> Proof:
    """Compare base + adapter with base + what was written of it, in another form, and read back: here P is R.

    Raises ModelError when they differ by more than rounding in the dtype that is computed in.
    """
    dtype, head = compute_dtype(base.folder, device), head_of(adapter)
    model = load_model(base, dtype=dtype, device=device, head=head)
    rows = _bounded(token_rows, model, adapter)
    alone = _logits(model, rows)
    with switched(model, adapter):
        expected = _logits(model, rows)
    with switched(model, written):
        found = _logits(model, rows)
    proof = _proof(expected, found, dtype, adapter_kl=_kl(expected, alone), unexplained=_largest(found - expected))
    # A factor's last bit may send a coarse product to the other neighbour
    allowed = max(NOISE, 4 * torch.finfo(dtype).eps) * proof.largest_logit
    if not proof.unexplained <= allowed:
        raise ModelError(_failed(proof.unexplained, allowed, what="what was written"))
    return proof


def token_rows(texts: list[str], tokenizer) -> list[list[int]]:
    """Texts as rows of token ids; those that come to nothing are left out."""
    rows = [tokenizer(text)["input_ids"] for text in texts]
    return [row for row in rows if row]


def compute_dtype(folder: Path, device: torch.device | str) -> torch.dtype:
    """float32 where it takes less than half of the free memory, else as the base is stored.

    Raises OutOfMemoryError when even that has no room: ask before a long merge.
    """
    tensors = [tensor for tensor in stored_tensors(folder).values() if tensor.dtype in DTYPES]
    free = free_bytes(device)
    if free is None or 4 * sum(torch.Size(tensor.shape).numel() for tensor in tensors) < free / 2:
        return torch.float32
    stored = sum(tensor.end - tensor.start for tensor in tensors)
    if stored > free:
        raise OutOfMemoryError(
            Problem(
                f"the proof loads the model once: {stored / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free",
                where=str(folder),
                fix="merge on a machine with more memory",
            )
        )
    sizes = {dtype: sum(t.end - t.start for t in tensors if t.dtype == dtype) for dtype in {t.dtype for t in tensors}}
    return DTYPES[max(sizes, key=sizes.__getitem__)]


def proof_device(folder: Path) -> torch.device:
    """The accelerator where the model fits into what is free there, else the CPU."""
    try:
        compute_dtype(folder, default_device())
    except OutOfMemoryError:
        return torch.device("cpu")
    return default_device()


def free_bytes(device: torch.device | str) -> int | None:
    """Memory that is free on a device; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = (line.split() for line in meminfo.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), None)


def _proof(
    expected: Tensor,
    found: Tensor,
    dtype: torch.dtype,
    *,
    adapter_kl: float,
    unexplained: float,
    rows_count: bool = False,
) -> Proof:
    return Proof(
        positions=len(expected),
        computed_in=dtype_name(dtype),
        largest_logit_difference=_largest(found - expected),
        largest_logit=_largest(expected),
        kl=_kl(expected, found),
        adapter_kl=adapter_kl,
        same_top1=float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        unexplained=unexplained,
        position="row" if rows_count else "token",
    )


def _bounded(rows: list[list[int]], model: nn.Module, adapter: Adapter) -> list[tuple[int, ...]]:
    """Different rows, whole: rows of one chat template begin alike, and what tells them apart comes late."""
    vocabulary = max(model.get_input_embeddings().num_embeddings, adapter.vocabulary)
    rows = list(dict.fromkeys(tuple(row[:MOST_TOKENS]) for row in rows if row))[:MOST_ROWS]
    if not rows:
        raise DataError(Problem("the proof has no row with any token", fix="give rows with text with `--data`"))
    if (largest := max(map(max, rows))) >= vocabulary:
        raise ModelError(
            Problem(
                f"the tokenizer has an id {largest}, and the base has {vocabulary} embeddings",
                fix="use the tokenizer that belongs to the base",
            )
        )
    return rows


@torch.no_grad()
def _logits(model: nn.Module, rows: list[tuple[int, ...]]) -> Tensor:
    """[positions, vocabulary] float32 on the CPU, of each row's last positions; of a classifier, [rows, labels].

    A row a forward: no padding, and no mask to go wrong.
    """
    device = model.get_input_embeddings().weight.device
    kept = MOST_POSITIONS // len(rows)
    inputs = (torch.tensor([row], device=device) for row in rows)
    if model.config.problem_type == CLASSIFIES:
        return torch.cat([model(input_ids=ids).logits.float().cpu() for ids in inputs])
    found = (model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0] for ids in inputs)
    return torch.cat([logits.float().cpu() for logits in found])


def _kl(expected: Tensor, found: Tensor) -> float:
    """Mean KL(expected ‖ found) in nats a token, summed in float64."""
    total = 0.0
    for p, q in zip(expected.split(16), found.split(16), strict=True):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return max(0.0, total / len(expected))


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _stored_dtypes(merged: Path, base: Path, adapter: Adapter) -> dict[str, torch.dtype] | torch.dtype:
    """The one float dtype of the merged files; where they have several, that of each changed module or parameter."""
    dtypes = {tensor.dtype for tensor in stored_tensors(merged).values() if tensor.dtype in DTYPES}
    if len(dtypes) == 1:
        return DTYPES[dtypes.pop()]
    stored, written = stored_tensors(base), stored_tensors(merged)
    where = places(base, adapter).items()
    own = {of_expert(path)[0]: DTYPES[stored[parts[0].tensor].dtype] for path, parts in where}
    beside = others(base, adapter)
    whole = {name: place.updated for name, place in beside.placed.items()} | {name: name for name in beside.new}
    tables = (table for table in tables_in_files(base, adapter) if table.path)
    whole |= {f"{t.path}.{ROWS}": beside.renamed.get(t.tensor, t.tensor) for t in tables}
    return own | {name: DTYPES[written[file].dtype] for name, file in whole.items()}


@torch.no_grad()
def merge_in_memory(model: nn.Module, adapter: Adapter, stored: dict[str, torch.dtype] | torch.dtype) -> None:
    """Replace each LoRA layer, and what is trained whole, by its base with the new weights, rounded as they are stored.

    In place.
    """
    for path, trained in trained_biases(model).items():
        dtype = stored[f"{path}.bias"] if isinstance(stored, dict) else stored
        rounded = trained.bias.to(dtype).to(trained.base.bias.dtype)
        trained.base.bias = nn.Parameter(rounded, requires_grad=False)
    remove_biases(model)
    for path, trained in trained_tokens(model).items():
        dtype = stored[f"{path}.{ROWS}"] if isinstance(stored, dict) else stored
        trained.base.weight[trained.tokens] = trained.rows.to(dtype).to(trained.base.weight.dtype)
    remove_tokens(model)
    for path, layer in lora_layers(model).items():
        weight = _merged(path, layer, adapter)
        _check_same(path, layer, weight)
        _set(layer.frozen, weight, stored[path] if isinstance(stored, dict) else stored)
    for path, module in whole_modules(model).items():
        for name, trained in list(module.trained.named_parameters()):
            dtype = stored[f"{path}.{name}"] if isinstance(stored, dict) else stored
            inner, _, last = name.rpartition(".")
            holder = module.base.get_submodule(inner)
            rounded = trained.to(dtype).to(holder.get_parameter(last).dtype)
            setattr(holder, last, nn.Parameter(rounded, requires_grad=False))
    remove(model)
    if not isinstance(stored, dict):
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored))


@torch.no_grad()
def _round(model: nn.Module, rounded: Callable[[Tensor], Tensor]) -> None:
    """Give every parameter the value that it comes back with. In place."""
    transposed = {id(m.weight) for m in linears(model).values() if storage_of(m).transposed}
    for parameter in model.parameters():
        if id(parameter) in transposed:
            parameter.copy_(rounded(parameter.T).T)
        else:
            parameter.copy_(rounded(parameter))


def _merged(path: str, layer: LoRALayer, adapter: Adapter) -> Tensor:
    """[..., out, in] float32."""
    W, device = layer.dense(), layer.lora_A.device
    if path in adapter.layers:
        return _on(device, adapter.layers[path]).merge_into(W, layer.scale)
    experts = zip(paths_of(path, layer.frozen), W, strict=True)
    return torch.stack([_on(device, adapter.layers[name]).merge_into(matrix, layer.scale) for name, matrix in experts])


def _set(weight: Weight, merged: Tensor, stored: torch.dtype) -> None:
    """Give a module its new weight, rounded as it is stored. A new parameter: the old one may be tied to the embedding."""
    old = weight.tensor
    new = merged.to(stored).to(old.dtype)
    new = (new.mT if weight.transposed else new).reshape(old.shape)
    setattr(weight.module, weight.parameter, nn.Parameter(new.contiguous(), requires_grad=False))


def _on(device: torch.device, factors: Factors) -> Factors:
    magnitude = None if factors.magnitude is None else factors.magnitude.to(device)
    return Factors(factors.A.to(device), factors.B.to(device), magnitude)


def _check_same(path: str, layer: LoRALayer, weight: Tensor) -> None:
    """The weight must act on random inputs as the layer does, in float32. Experts are compared where the model answers."""
    if not isinstance(layer, LoRAModule):
        return
    x = _probe(layer.frozen, path).to(weight.device)
    alone = copy.deepcopy(layer).float()
    expected = alone(x)
    _set(alone.frozen, weight, torch.float32)
    found = alone.base(x)
    if not _largest(found - expected) <= NOISE * _largest(expected):
        raise ModelError(
            Problem(
                f"the merged weight of {path} does not act as the layer: off by {_largest(found - expected):.2g}",
                fix="use base and adapter side by side, and report this; nothing was written",
            )
        )


def _probe(weight: Weight, path: str) -> Tensor:
    """Something that a module takes: vectors, ids, or a picture somewhat larger than the kernel."""
    generator = generator_for(0, path)
    if weight.kind == EMBEDDING:
        return torch.randint(weight.shape[1], (4,), generator=generator)
    if weight.kind == CONVOLUTION:
        sides = (2 * size for size in weight.kernel)
        return torch.randn(1, weight.module.in_channels, *sides, generator=generator)
    return torch.randn(4, weight.shape[1], generator=generator)


def _failed(difference: float, allowed: float, what: str = "the merged model") -> Problem:
    return Problem(
        f"{what} does not answer as base + adapter: logits differ by {difference:.2g} beyond what storing "
        f"the weights explains, and {allowed:.2g} is allowed",
        fix="use base and adapter side by side, and report this; nothing was written",
    )
