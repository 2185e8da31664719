"""Adapters made from adapters: several composed into one, or one cut to a lower rank."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_cli.errors import DivergedError, ModelError, Problem, RecipeError
from lora_cli.export.adapter_folder import Made, made_by, write_adapter
from lora_cli.export.names import parameters_of, weights_of_base
from lora_cli.export.staging import refuse_output
from lora_cli.export.table import is_transposed
from lora_cli.lora.adapter import Adapter
from lora_cli.lora.algebra import (
    METHODS,
    Fits,
    How,
    Term,
    base_differences,
    compose,
    resize,
    shape_problems,
)
from lora_cli.lora.base_files import fingerprint
from lora_cli.lora.beside import Read, no_base
from lora_cli.lora.completion import load_for
from lora_cli.lora.gains import no_weight
from lora_cli.lora.svd import SVD
from lora_cli.models.base import Base
from lora_cli.models.heads import head_of

log = logging.getLogger(__name__)


def compose_folders(
    folders: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float],
    how: How,
    base: Base | None = None,
    allow_base_mismatch: bool = False,
    progress: Callable[[str], None] = lambda path: None,
) -> Made:
    """Compose the adapters in `folders` and write the result. Raises before any work for what doesn't go together.

    The base is needed for what is trained beside layers, where the weights of that don't add up to 1.
    """
    _check_settings(folders, weights, how)
    refuse_output(out)
    terms = [Term(load_for(folder), weight, str(folder)) for folder, weight in zip(folders, weights, strict=True)]
    differences = _check_one_base(terms, allow=allow_base_mismatch)
    transposed = {is_transposed(folder) for folder in folders}
    if len(transposed) > 1 or (problems := shape_problems(terms)):
        raise ModelError(*(problems[:3] if len(transposed) == 1 else [_mixed_storage()]))
    read, own = no_base, no_weight
    if base:
        differences += _check_is_base(base, terms, allow=allow_base_mismatch)
        read, own = _reader(base, terms), weights_of_base(base.folder, [term.adapter for term in terms])
    adapter, fits = compose(terms, how, read=read, own=own, each=progress)
    _check_acts(adapter, fits, known=base is not None)
    adapter = replace(adapter, tokenizer=next((t.adapter.tokenizer for t in terms if t.adapter.tokenizer), None))
    settings = {"method": how.method, "r": how.r, "allow_base_mismatch": differences}
    if how.kept:
        settings |= {"density": how.kept, "seed": how.seed}
    parents = [parent(term.adapter, folder, weight=term.weight) for term, folder in zip(terms, folders, strict=True)]
    adapter = made_by("compose", adapter, parents, **settings)
    written = write_adapter(adapter, out, tokenizer=with_tokenizer(folders), transposed=transposed.pop())
    return Made(adapter, written, fits, tuple(differences))


def resize_folder(
    folder: Path,
    out: Path,
    choose: Callable[[Mapping[str, SVD]], Mapping[str, int]],
    *,
    base: Base | None = None,
    allow_base_mismatch: bool = False,
) -> Made:
    """Write the adapter of `folder` with the ranks that `choose` picks from its spectra: the best there is of them.

    The base is needed for a DoRA.
    """
    refuse_output(out)
    adapter = load_for(folder)
    differences, own = [], no_weight
    if base:
        differences = _check_is_base(base, [Term(adapter)], allow=allow_base_mismatch)
        own = weights_of_base(base.folder, [adapter])
    made, fits = resize(adapter, choose, own)
    settings = {"allow_base_mismatch": differences} if differences else {}
    made = made_by("resize", made, [parent(adapter, folder)], **settings)
    written = write_adapter(made, out, tokenizer=with_tokenizer([folder]), transposed=is_transposed(folder))
    return Made(made, written, fits, tuple(differences))


def parent(adapter: Adapter, folder: Path, **more: object) -> dict[str, object]:
    """What a made adapter keeps of one that it was made from: its hash and the name of its folder, never the path."""
    return {"sha256": adapter.digest(), "name": folder.resolve().name, **more}


def with_tokenizer(folders: Sequence[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)


def _check_settings(folders: Sequence[Path], weights: Sequence[float], how: How) -> None:
    problems = []
    if len(weights) != len(folders):
        problems.append(
            Problem(f"`--weights` has {len(weights)} numbers for {len(folders)} adapters", fix="give one number each")
        )
    if how.density is not None and METHODS[how.method].density is None:
        problems.append(
            Problem(f"`--method {how.method}` keeps every entry: it has no `--density`", fix="leave `--density` out")
        )
    if problems:
        raise RecipeError(*problems)


def _check_one_base(terms: Sequence[Term], *, allow: bool) -> list[str]:
    """The names of tensors in which the adapters' bases differ. Raises ModelError for any, unless they are allowed."""
    found = base_differences(terms)
    if found and not allow:
        raise ModelError(
            *(
                Problem(
                    f"{name} was trained on another base than {terms[0].name}: they differ in {', '.join(names[:3])}",
                    where=name,
                    fix="compose adapters of one base, or accept these with `--allow-base-mismatch`",
                )
                for name, names in found
            )
        )
    _check_one_tokenizer(terms, allow=allow)
    return [tensor for _, names in found for tensor in names]


def _check_one_tokenizer(terms: Sequence[Term], *, allow: bool) -> None:
    """Raise ModelError for adapters whose tokens have other ids; that they were trained with other templates is said."""
    known = [term for term in terms if term.adapter.tokenizer]
    for other in known[1:]:
        first = known[0]
        differences = first.adapter.tokenizer.differences(other.adapter.tokenizer)
        if not allow and ("vocabulary" in differences or "cutting" in differences):
            what = f"{first.name} and {other.name} were trained with tokenizers of other ids"
            fix = "compose adapters of one tokenizer, or accept these with `--allow-base-mismatch`"
            raise ModelError(Problem(what, fix=fix))
        if differences:
            log.warning("%s and %s were trained with another %s", first.name, other.name, " and ".join(differences))


def _check_acts(adapter: Adapter, fits: Fits, *, known: bool) -> None:
    """Raise DivergedError where nothing is left; what a DoRA's magnitudes do is `known` beside the base alone."""
    if adapter.config.use_dora:
        acts = not known or any(fit.norm for fit in fits.values())
    else:
        acts = any(factors.act() for factors in adapter.layers.values())
    if not acts:
        raise DivergedError(
            Problem("with these weights the adapters cancel: the sum does nothing", fix="give other `--weights`")
        )


def _check_is_base(base: Base, terms: Sequence[Term], *, allow: bool) -> list[str]:
    found = fingerprint(base.folder)
    return list(dict.fromkeys(n for t in terms for n in t.adapter.check_base(found, base.folder, allow=allow)))


def _reader(base: Base, terms: Sequence[Term]) -> Read:
    """Of what the base has where an adapter trains something beside its layers."""
    heads = (head_of(term.adapter) for term in terms)
    return parameters_of(base.folder, next((head for head in heads if head), None))


def _mixed_storage() -> Problem:
    return Problem(
        "the adapters disagree on whether the base's weights are stored [in, out] (`fan_in_fan_out`)",
        fix="compose adapters of one base",
    )
