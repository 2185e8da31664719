"""An adapter is a value: a config, the low-rank factors of each layer, and what is trained whole, apart from any model."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_cli.errors import DivergedError, ModelError, Problem
from lora_cli.lora.base_files import Fingerprint
from lora_cli.lora.biases import LORA_ONLY, NONE
from lora_cli.lora.config import LoRAConfig, of_expert
from lora_cli.lora.identity import TokenizerFingerprint
from lora_cli.lora.inject import lora_layers, remove, trained_beside, wrap
from lora_cli.lora.layer import LoRALayer, merged_weight
from lora_cli.lora.shards import gathered
from lora_cli.lora.tokens import ROWS, TrainedTokens
from lora_cli.lora.tokens import tables as tables_of
from lora_cli.lora.vocabulary import make_room, rows_for
from lora_cli.lora.weights import CONVOLUTION, EMBEDDING, EXPERTS, LINEAR, Weight, weights_of
from lora_cli.lora.whole import State

log = logging.getLogger(__name__)

GIVE_ITS_BASE = "give the base it was trained on with `--base`, or accept this one with `--allow-base-mismatch`"


@dataclass(frozen=True)
class Factors:
    """One layer's update: A [r, in], B [out, r], and DoRA's magnitude [out]."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None

    def norm(self) -> float:
        """‖B A‖ = ‖R_B R_Aᵀ‖ with B = Q_B R_B and Aᵀ = Q_A R_A, in float64.

        r × r, and unlike Gram matrices it squares nothing, so that a small update beside a large start that cancels is
        seen.
        """
        A, B = self.A.double(), self.B.double()
        return float((torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T).norm())

    def merge_into(self, W: Tensor, scale: float) -> Tensor:
        """[out, in] float32: the weight that acts like W with this update beside it."""
        return merged_weight(W, self.A, self.B, scale, self.magnitude)

    def act(self) -> bool:
        """Whether B A is more than what its float32 factors round off."""
        A, B = self.A.double(), self.B.double()
        return self.norm() > torch.finfo(torch.float32).eps * float(B.norm() * A.norm())


@dataclass(frozen=True)
class Form:
    """What PEFT's file must know of a weight that is no linear layer's: its kind, and the sides of a kernel."""

    kind: str
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """`layers` holds the factors by the path of the module they belong to, float32, on the CPU. Experts that share a
    parameter have a path each (see `of_expert`), and one rank. `forms` says what of it is no linear layer's.

    `extras` holds the parameters of the modules that are trained whole, and biases, by the module's path; `labels` are those of a
    classifier, in the order of its head's outputs.
    `base` and `tokenizer` say what it was trained on, where that is known; `origin` what it was made from, where it was
    not trained but made from other adapters or models. `completes` names the storage (`nf4`) of the base whose rounding
    it makes good (LoftQ): on the base in any other storage it is wrong, and `completion.py` tells what is right there.
    """

    config: LoRAConfig
    layers: Mapping[str, Factors]
    base: Fingerprint | None = None
    extras: Mapping[str, State] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    tokenizer: TokenizerFingerprint | None = None
    origin: Mapping[str, object] | None = None
    forms: Mapping[str, Form] = field(default_factory=dict)
    completes: str | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: LoRAConfig,
        base: Fingerprint | None = None,
        labels: Sequence[str] = (),
        tokenizer: TokenizerFingerprint | None = None,
    ) -> "Adapter":
        """A copy of what the model has learned, as a plain adapter of its unchanged base.

        A start that is taken off in the forward (PiSSA, OLoRA) becomes part of the factors, which doubles the rank.
        Of a model in shards all processes make it together, and each gets the whole.
        """
        found = lora_layers(model)
        layers = {name: factors for path, layer in found.items() for name, factors in _of_layer(path, layer)}
        started = any(layer.start_A is not None for layer in found.values())
        extras = {path: module.state() for path, module in trained_beside(model).items()}
        return cls(
            config.with_rank_times(2) if started else config,
            layers,
            base,
            extras,
            tuple(labels),
            tokenizer,
            forms=forms_of({path: layer.frozen for path, layer in found.items()}),
        )

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for _, tensor in self._tensors())

    @property
    def kinds(self) -> set[str]:
        """Of the weights it changes (`weights.py`)."""
        kinds = {path: form.kind for path, form in self.forms.items()}
        return {EXPERTS if of_expert(path)[1] is not None else kinds.get(path, LINEAR) for path in self.layers}

    @property
    def biases(self) -> list[str]:
        """The paths of the modules of which the bias alone is trained."""
        return [path for path, state in self.extras.items() if self.config.bias != NONE and set(state) == {"bias"}]

    @property
    def tables(self) -> list[str]:
        """The paths of the embeddings and heads of which some tokens' rows are trained."""
        return [path for path, state in self.extras.items() if set(state) == {ROWS}]

    @property
    def vocabulary(self) -> int:
        """How many rows a table has at least, to have those of the tokens that are trained."""
        return rows_for(self.config.trainable_tokens) if self.tables else 0

    @property
    def whole(self) -> list[str]:
        """The paths of the modules that are trained whole."""
        return [path for path in self.extras if path not in {*self.biases, *self.tables}]

    def updates(self) -> dict[str, float]:
        """‖scale · B A‖ of each layer: how far it moved. DoRA's magnitudes are not in it."""
        return {path: abs(self.config.at(path).scale) * factors.norm() for path, factors in self.layers.items()}

    def inject_into(self, model: nn.Module) -> None:
        """Put this adapter's layers into a model that has none. Raises ModelError for modules that don't fit, DivergedError
        for a DoRA that does nothing there.

        Tables that lack rows for its tokens get them, and keep them when it is taken out again.
        """
        self.check_fits(model)
        if self.tables:
            self._check_tables(model)
            make_room(model, self.config.trainable_tokens)
        paths = list(dict.fromkeys(of_expert(path)[0] for path in self.layers))
        wrap(model, replace(self.config, lora_dropout=0.0), paths, whole=self.whole)
        beside = trained_beside(model)
        # PEFT may train the rows of the embedding alone where the head has its own: those of the head stay the base's
        needed = {path for path, module in beside.items() if not isinstance(module, TrainedTokens) or not self.tables}
        if without := (needed - set(self.extras)) | (set(self.extras) - set(beside)):
            remove(model)
            of_bias = f"`bias: {self.config.bias}`, and that"
            says = of_bias if self.config.bias != NONE else "`trainable_token_indices`, and those"
            what = f"the adapter is not whole: it says {says} of {min(without)} is not in it"
            lost = "; PEFT 0.10 to 0.14, and some around them, did not save these biases"
            fix = "copy or train the adapter again" + (lost if self.config.bias == LORA_ONLY else "")
            raise ModelError(Problem(what, fix=fix))
        if self.config.use_dora and not self._moves(model):
            remove(model)
            raise DivergedError(_dead("every lora_B is zero, and every magnitude is the base's own row norm", ""))
        self.copy_into(model)

    def _check_tables(self, model: nn.Module) -> None:
        """Raise ModelError where embedding and head have rows of their own, and the base one table for both; say where a
        vocabulary that was trained whole is smaller than the base's."""
        if len(self.tables) > len(tables_of(model)):
            what = f"the adapter has rows of {' and of '.join(self.tables)}, and they are one table in this base"
            fix = "untie the base: save it with `tie_word_embeddings: false` and a head of its own, and give it with `--base`"
            raise ModelError(Problem(what, fix=fix))
        rows = len(model.get_input_embeddings().weight)
        if self.config.trainable_tokens == tuple(range(self.vocabulary)) and self.vocabulary < rows:
            text = "the adapter was trained with a vocabulary of %d, and the base's other %d tokens keep their rows"
            log.warning(text, self.vocabulary, rows - self.vocabulary)

    def _moves(self, model: nn.Module) -> bool:
        """Whether a DoRA does more than the base, in whose fresh layers it is about to be: at their start, magnitudes are
        the base's row norms."""
        if any(factors.act() for factors in self.layers.values()):
            return True
        return not all(
            torch.allclose(self.layers[path].magnitude, gathered(layer.magnitude.detach()).cpu(), rtol=1e-6, atol=0)
            for path, layer in lora_layers(model).items()
        )

    def copy_into(self, model: nn.Module) -> None:
        """Copy the factors, and what is trained whole, into layers of the same paths and shapes that are in place."""
        with torch.no_grad():
            for path, layer in lora_layers(model).items():
                factors = self.factors_at(path)
                layer.lora_A.copy_(factors.A)
                layer.lora_B.copy_(factors.B)
                if factors.magnitude is not None:
                    layer.magnitude.copy_(factors.magnitude)
        for path, module in trained_beside(model).items():
            if path in self.extras:
                module.load(self.extras[path])

    def factors_at(self, path: str) -> Factors:
        """The factors of a layer; of a parameter with experts, those of all of them, one behind the other."""
        if path in self.layers:
            return self.layers[path]
        experts = [self.layers[name] for name in names_of_experts(path, self.layers)]
        return Factors(torch.stack([f.A for f in experts]), torch.stack([f.B for f in experts]))

    def digest(self) -> str:
        """SHA-256 of what the adapter computes: paths, scales, factors and magnitudes, and what is trained whole."""
        found = hashlib.sha256()
        for path, factors in sorted(self.layers.items()):
            tensors = (factors.A, factors.B, factors.magnitude)
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
            found.update(repr((path, float(self.config.at(path).scale), shapes)).encode())
            for tensor in tensors:
                if tensor is not None:
                    found.update(_bytes(tensor))
        for path, state in sorted(self.extras.items()):
            for name, tensor in sorted(state.items()):
                found.update(repr((path, name, tuple(tensor.shape))).encode() + _bytes(tensor))
        return found.hexdigest()

    def check_finite(self, where: str = "") -> None:
        """Raise DivergedError when a value is not finite."""
        broken = list(dict.fromkeys(path for path, tensor in self._tensors() if not tensor.isfinite().all()))
        if broken:
            raise DivergedError(
                Problem(
                    f"the adapter holds values that are not finite in {len(broken)} layers, first {broken[0]}",
                    where=where,
                    fix="train again from an earlier checkpoint, with a lower `training.learning_rate`",
                )
            )

    def check_alive(self, where: str = "") -> None:
        """Raise DivergedError when a value is not finite, or when B A is zero in every layer: LoRA changes nothing.

        A start that was taken off again (PiSSA, OLoRA) counts for nothing. Of DoRA only finiteness can be known here: with
        B A zero its magnitude may still have moved away from the base's row norms, which the adapter does not hold.
        `inject_into` knows more.
        """
        self.check_finite(where)
        if self.config.use_dora or any(factors.act() for factors in self.layers.values()):
            return
        zero = "lora_B · lora_A" if any(f.B.any() for f in self.layers.values()) else "lora_B"
        alone = f" beside the modules trained whole ({', '.join(self.whole)})" if self.whole else ""
        raise DivergedError(_dead(f"every {zero} is zero", where, alone))

    def check_base(
        self, found: Fingerprint, where: Path, *, allow: bool = False, fix: str = GIVE_ITS_BASE
    ) -> list[str]:
        """The tensors that tell the base with the fingerprint `found` from the one the adapter was trained on.

        Raises ModelError where there are any, unless they are allowed; an adapter that names no base fits all.
        """
        differences = self.base.differences(found) if self.base else []
        if differences and not allow:
            listed = ", ".join(differences[:3]) + (f" and {len(differences) - 3} more" if len(differences) > 3 else "")
            what = f"the adapter was trained on another base: they differ in {listed}"
            raise ModelError(Problem(what, where=str(where), fix=fix))
        return differences

    def check_fits(self, model: nn.Module) -> None:
        """Raise ModelError for modules that the model lacks or has in another shape, and for an adapter that lacks some
        of the modules that its own config names: a part of its file is not there."""
        found = weights_of(model)
        problems = []
        for path, factors in self.layers.items():
            parameter, expert = of_expert(path)
            weight = found.get(parameter)
            if weight is None or (expert is None) != (weight.count is None) or (expert or 0) >= (weight.count or 1):
                problems.append(
                    Problem(
                        f"the adapter changes {path}, which this base does not have",
                        fix="give the base it was trained on with `--base`",
                    )
                )
                continue
            shape, form = (factors.B.shape[0], factors.A.shape[1]), form_of(weight)
            if shape != weight.shape or form != self.forms.get(path):
                problems.append(
                    Problem(
                        f"{path} is {_shown(weight.shape, form)} in this base, and "
                        f"{_shown(shape, self.forms.get(path))} in the adapter",
                        fix="give the base it was trained on with `--base`",
                    )
                )
        problems += self.misfits_of_extras(dict(model.named_modules()))
        problems = problems or self._missing_layers(found)
        if problems:
            raise ModelError(
                *problems[:3], *([Problem(f"… and {len(problems) - 3} layers more")] if len(problems) > 3 else [])
            )

    def misfits_of_extras(self, modules: Mapping[str, nn.Module]) -> Iterator[Problem]:
        """What tells the parameters trained whole from those of a base's modules, by path."""
        biases = set(self.biases)
        for path, state in self.extras.items():
            fix = "give the base it was trained on with `--base`"
            if path not in modules:
                yield Problem(f"the adapter trains {path} whole, which this base does not have", fix=fix)
                continue
            own = modules[path].named_parameters()
            there = {name: list(p.shape) for name, p in own if path not in biases or name == "bias"}
            if path in self.tables:
                there = {ROWS: [len(self.config.trainable_tokens), modules[path].weight.shape[1]]}
            found = {name: list(tensor.shape) for name, tensor in state.items()}
            if there != found:
                yield Problem(f"{path} has {_listed(there)} in this base, and {_listed(found)} in the adapter", fix=fix)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, with the path of its module."""
        for path, f in self.layers.items():
            yield from ((path, tensor) for tensor in (f.A, f.B, f.magnitude) if tensor is not None)
        for path, state in self.extras.items():
            yield from ((path, tensor) for tensor in state.values())

    def _missing_layers(self, weights: Mapping[str, Weight]) -> list[Problem]:
        targets, parameters = self.config.target_modules, self.config.target_parameters
        endings = tuple(f".{target}" for target in (*targets, *parameters))
        named = [
            name
            for path, weight in weights.items()
            if f".{path}".endswith(endings) and not f"{path}.".startswith(tuple(f"{whole}." for whole in self.whole))
            for name in paths_of(path, weight)
        ]
        missing = [path for path in named if path not in self.layers]
        if not missing:
            return []
        return [
            Problem(
                f"the adapter is not whole: its config names {len(named)} modules of this base, and {len(missing)} of "
                f"them have no factors, first {missing[0]}",
                fix="copy or train the adapter again",
            )
        ]


def _dead(why: str, where: str, alone: str = "") -> Problem:
    fix = "check that the run trained for a step and that its learning rate is above 0"
    return Problem(f"the adapter does nothing{alone}: {why}", where=where, fix=fix)


def form_of(weight: Weight) -> Form | None:
    """None for a matrix: a linear layer, or an expert."""
    return Form(weight.kind, weight.kernel) if weight.kind in (EMBEDDING, CONVOLUTION) else None


def forms_of(weights: Mapping[str, Weight]) -> dict[str, Form]:
    return {path: form for path, weight in weights.items() if (form := form_of(weight))}


def paths_of(path: str, weight: Weight) -> list[str]:
    """The paths of a weight in an adapter: its own, or one for each of its experts."""
    return [path] if weight.count is None else [f"{path}[{i}]" for i in range(weight.count)]


def names_of_experts(parameter: str, layers: Collection[str]) -> list[str]:
    """The paths of a parameter's experts, in their order."""
    return list(takewhile(lambda name: name in layers, (f"{parameter}[{i}]" for i in count())))


def _of_layer(path: str, layer: LoRALayer) -> Iterator[tuple[str, Factors]]:
    A, B = map(_copy, layer.factors())
    if A.ndim == 3:
        yield from ((f"{path}[{i}]", Factors(A[i], B[i])) for i in range(len(A)))
    else:
        yield path, Factors(A, B, None if layer.magnitude is None else _copy(layer.magnitude))


def _shown(shape: tuple[int, int], form: Form | None) -> str:
    return f"{list(shape)}" + (f" ({form.kind}{' ' + str(list(form.kernel)) if form.kernel else ''})" if form else "")


def _copy(tensor: Tensor) -> Tensor:
    return gathered(tensor.detach()).to("cpu", torch.float32, copy=True)


def _listed(shapes: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no parameters"


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
