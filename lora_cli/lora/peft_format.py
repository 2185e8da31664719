"""PEFT's two files, both ways: adapter_config.json and adapter_model.safetensors.

Written so that PEFT, vLLM, llama.cpp and others load the folder as it is: classic keys only, float32, whole-number
alphas as integers, target_modules as a sorted list. Read strictly: a key or a setting that would be ignored is an error,
and names that a wrapper has bent are put right with a notice.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lora_cli.errors import ModelError, Problem, SafetyError
from lora_cli.limits import read_json
from lora_cli.lora.adapter import Adapter, Factors, Form
from lora_cli.lora.base_files import PICKLES, Fingerprint, read_header, read_metadata
from lora_cli.lora.biases import ALL, LORA_ONLY, NONE
from lora_cli.lora.config import SEQ_CLS, LoRAConfig, of_expert
from lora_cli.lora.identity import TokenizerFingerprint
from lora_cli.lora.peft_tables import PREFIX, in_full, of_every_token, trained_rows
from lora_cli.lora.tokens import ROWS
from lora_cli.lora.weights import CONVOLUTION, EMBEDDING

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LARGEST_NUMBER = 10**9  # JSON's numbers have no end
SHOWN_CHARACTERS = 80  # of a foreign value in a message
FINGERPRINT = "lora.base_fingerprint"
LABELS = "lora.labels"
MOST_LABELS = 100_000
HEADS = ("classifier", "score")  # PEFT names both in the config of every classifier
TOKENIZER = "lora.tokenizer_fingerprint"
ORIGIN = "lora.origin"
COMPLETES = "lora.completes"
LARGEST_CONFIG_BYTES = 1_000_000
LARGEST_HEADER_BYTES = 1_000_000  # 126 blocks with 7 targets of 3 tensors each have 0.4 MB
LARGEST_WEIGHTS_BYTES = 4_000_000_000

# Settings of PEFT that change what an adapter computes and that are not read here: anything but these values is refused.
NOT_READ: Mapping[str, tuple] = {
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # the others change the base's weights
    "bias": (NONE, ALL, LORA_ONLY),
    "lora_bias": (False,),
    "ensure_weight_tying": (False, None),  # one adapter on both sides of a tie
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}

# With these, or a pattern as `target_modules`, names alone don't say which modules are meant: the file's own do.
CHOOSES_OTHERWISE = ("exclude_modules", "layers_to_transform")
COPIES = tuple(f".{name}.base_layer.weight" for name in ("embed_tokens", "lm_head"))
BIASES_AGAIN = (".modules_to_save.bias", ".original_module.bias")
PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# What wrappers put into the names of a module's tensors, wherever they stand
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_NUMBER


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= LARGEST_NUMBER  # NaN is neither


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _are_texts(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _are_patterns(value: object, fits: Callable[[object], bool]) -> bool:
    return value is None or (
        isinstance(value, dict) and all(_is_pattern(pattern) and fits(v) for pattern, v in value.items())
    )


def _is_one_list(value: object) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value or []]
    return all(found == lists[0] and isinstance(found, list) and all(map(_is_token, found)) for found in lists)


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_NUMBER


# What a value of adapter_config.json must be, where it would otherwise fail far from here, or compute nonsense.
MUST_BE: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "base_model_name_or_path": (_is_text, "a text or null"),
    "revision": (_is_text, "a text or null"),
    "task_type": (_is_text, "a text or null"),
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_alpha, "a number above 0"),
    "lora_dropout": (lambda value: value in (None, 0) or _is_alpha(value), "0 or a number above 0"),
    "target_modules": (
        lambda value: _is_text(value) or _are_texts(value),
        "a text or a list of texts",
    ),
    "rank_pattern": (lambda value: _are_patterns(value, _is_rank), "patterns with whole numbers above 0"),
    "alpha_pattern": (lambda value: _are_patterns(value, _is_alpha), "patterns with numbers above 0"),
    "target_parameters": (_are_texts, "a list of texts or null"),
    "modules_to_save": (_are_texts, "a list of texts or null"),
    "trainable_token_indices": (_is_one_list, "one list of tokens, the same for every module"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
}


def save_adapter(adapter: Adapter, folder: Path, *, transposed: bool = False) -> None:
    """Write the two files, into a folder that is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    # plain writes, because `save_file` makes files that only their owner may read
    for name, content in adapter_files(adapter, transposed=transposed).items():
        (folder / name).write_bytes(content)


def adapter_files(adapter: Adapter, *, transposed: bool = False) -> dict[str, bytes]:
    """The two files by name. `transposed` tells PEFT that the base's weights are [in, out] (GPT-2's Conv1D)."""
    known = {
        FINGERPRINT: adapter.base and adapter.base.to_json(),
        LABELS: adapter.labels and json.dumps(adapter.labels),
        TOKENIZER: adapter.tokenizer and adapter.tokenizer.to_json(),
        ORIGIN: adapter.origin and json.dumps(adapter.origin, sort_keys=True),
        COMPLETES: adapter.completes,
    }
    metadata = {"format": "pt"} | {key: text for key, text in known.items() if text}
    return {
        CONFIG: (json.dumps(to_peft(adapter.config, transposed, adapter.tables), indent=2) + "\n").encode(),
        WEIGHTS: _in_order(save(to_tensors(adapter), metadata)),
    }


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter that `lora` or PEFT wrote; keys that torch.compile, DDP or a bare state_dict bent are put right.

    Raises ModelError for damage or surplus, SafetyError for a pickle and for sizes that no adapter has, DivergedError
    for values that are not finite.
    """
    found = _read_config(folder)
    config = from_peft(found, where=folder / CONFIG)
    file = folder / WEIGHTS
    if not file.is_file():
        raise _no_weights(folder)
    if file.stat().st_size > LARGEST_WEIGHTS_BYTES:
        raise SafetyError(
            Problem(
                f"it is larger than {LARGEST_WEIGHTS_BYTES:,} bytes",
                where=str(file),
                fix="train with a lower `lora.r`; if it came from elsewhere, don't use it",
            )
        )
    read_header(file, LARGEST_HEADER_BYTES)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(Problem(f"it is damaged: {error}", where=str(file), fix="copy or train it again")) from error
    tensors = _without_copies(_repaired(tensors, where=file), where=file)
    listed = config.trainable_tokens
    tables, used = ({}, set()) if listed else in_full(tensors, config.modules_to_save)
    if tables:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in used}
        config = of_every_token(config, tables)
    extras = _extras(tensors, config.modules_to_save)
    _check_extras(extras, config, where=file)
    whole = {f"{PREFIX}{path}.{name}" for path, state in extras.items() for name in state}
    biases = _biases({name: tensor for name, tensor in tensors.items() if name not in whole}, config.bias)
    extras |= {path: {"bias": tensor.to(torch.float32)} for path, (_, tensor) in biases.items()}
    whole |= {name for name, _ in biases.values()}
    others = {name: tensor for name, tensor in tensors.items() if name not in whole}
    if listed:
        tables, used = trained_rows(others, listed)
        whole |= used
    extras |= {path: {ROWS: rows.to(torch.float32)} for path, rows in tables.items()}
    layers, forms = _layers({name: t for name, t in tensors.items() if name not in whole}, config, where=file)
    if any(found.get(key) for key in CHOOSES_OTHERWISE) or isinstance(found.get("target_modules"), str):
        config = replace(config, target_modules=tuple(path for path in layers if of_expert(path)[1] is None))
    base, tokenizer, origin, completes = _identity(file)
    adapter = Adapter(
        config, layers, base, extras, _labels(file, config, extras), tokenizer, origin, forms, completes=completes
    )
    adapter.check_finite(where=str(file))
    return adapter


def load_alive(folder: Path) -> Adapter:
    """As `load_adapter`; raises DivergedError for an adapter that does nothing, too."""
    adapter = load_adapter(folder)
    adapter.check_alive(where=str(folder))
    return adapter


def to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's names: `base_model.model.<path>.lora_A.weight`, and `….lora_magnitude_vector` without `.weight`.

    What is trained whole has the names that it has in the base, behind the same prefix.
    """
    tensors = {}
    for path, factors in adapter.layers.items():
        if of_expert(path)[1] is None:
            tensors |= {f"{PREFIX}{path}.{name}": t for name, t in _of_form(factors, adapter.forms.get(path)).items()}
    for path, parameters in _modules_of_experts(adapter.layers).items():
        for depth, name in enumerate(reversed(parameters)):
            tensors |= _of_experts(f"{PREFIX}{path}{'.base_layer' * depth}", adapter.factors_at(f"{path}.{name}"))
    for path, state in adapter.extras.items():
        # what PEFT wraps stands one deeper there
        path = f"{path}.base_layer" if path in adapter.layers else path
        tensors |= {f"{PREFIX}{path}.{name}": tensor.contiguous() for name, tensor in state.items()}
    return tensors


def _of_form(factors: Factors, form: Form | None) -> dict[str, Tensor]:
    """A layer's tensors in PEFT's shapes."""
    A, B, magnitude = factors.A, factors.B, factors.magnitude
    names = ("lora_A.weight", "lora_B.weight")
    if form is not None and form.kind == EMBEDDING:
        names = ("lora_embedding_A", "lora_embedding_B")
    elif form is not None:
        points = (1,) * len(form.kernel)
        A, B = A.view(len(A), -1, *form.kernel), B.view(*B.shape, *points)
        magnitude = None if magnitude is None else magnitude.view(1, -1, *points)
    found = dict(zip(names, (A.contiguous(), B.contiguous()), strict=True))
    return found if magnitude is None else found | {"lora_magnitude_vector": magnitude.contiguous()}


def _of_experts(name: str, factors: Factors) -> dict[str, Tensor]:
    """The experts of a parameter in one A [experts · r, in], expert by expert, and one B [out, r · experts], rank by rank."""
    A, B = factors.A.flatten(0, 1), factors.B.permute(1, 2, 0).flatten(1)
    return {f"{name}.lora_A.weight": A.contiguous(), f"{name}.lora_B.weight": B.contiguous()}


def _modules_of_experts(paths: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of each module of experts, in the order in which the module has them.

    PEFT puts a wrapper into a wrapper, the first parameter's innermost, and names tensors by how deep they are.
    """
    found: dict[str, list[str]] = {}
    for parameter in dict.fromkeys(of_expert(path)[0] for path in paths if of_expert(path)[1] is not None):
        module, _, name = parameter.rpartition(".")
        found.setdefault(module, []).append(name)
    return {module: in_order_of_use(names) for module, names in found.items()}


def in_order_of_use(parameters: Iterable[str]) -> list[str]:
    """What leads into an expert before what leads out of it: the order in which transformers' experts have them."""
    return sorted(parameters, key=lambda name: ("down" in name, name))


def to_peft(config: LoRAConfig, transposed: bool = False, tables: Sequence[str] = ()) -> dict:
    """adapter_config.json. `init_lora_weights` is always true: a loaded adapter must not start again.

    `tables` are the paths of which some tokens' rows are trained. They, and `target_parameters`, stand in it where there
    are some: older PEFTs don't know the words.
    """
    parameters = {"target_parameters": sorted(config.target_parameters)} if config.target_parameters else {}
    rows = {"trainable_token_indices": {path: list(config.trainable_tokens) for path in tables}} if tables else {}
    newer = parameters | rows
    return newer | {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "r": config.r,
        "lora_alpha": _whole(config.lora_alpha),
        # PEFT has none where parameters are targets, and refuses any
        "lora_dropout": 0.0 if config.target_parameters else config.lora_dropout,
        "target_modules": sorted(config.target_modules),
        "exclude_modules": None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {pattern: _whole(alpha) for pattern, alpha in config.alpha_pattern.items()},
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": config.bias,
        "fan_in_fan_out": transposed,
        "modules_to_save": list(config.modules_to_save) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def from_peft(found: Mapping, where: Path) -> LoRAConfig:
    """A LoRAConfig from adapter_config.json's mapping. Raises ModelError for other methods and for settings not read."""
    if found.get("peft_type") != "LORA":
        raise ModelError(
            Problem(f"`peft_type` is {found.get('peft_type')!r}, not LORA", where=str(where), fix="give a LoRA adapter")
        )
    problems = [
        Problem(
            f"the adapter uses {_shown(key, found)}, which `lora` does not read yet",
            where=str(where),
            fix="merge it with PEFT, or train it without",
        )
        for key, plain in NOT_READ.items()
        if key in found and found[key] not in plain
    ]
    problems += [
        Problem(
            f"{_shown(key, found)} must be {kind}",
            where=str(where),
            fix="copy or train the adapter again",
        )
        for key, (fits, kind) in MUST_BE.items()
        if key in found and not fits(found[key])
    ]
    if problems:
        raise ModelError(*problems)
    targets = found.get("target_modules") or ()
    return LoRAConfig(
        r=int(found.get("r", 8)),
        lora_alpha=found.get("lora_alpha", 8),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        lora_dropout=float(found.get("lora_dropout") or 0.0),
        use_rslora=bool(found.get("use_rslora")),
        use_dora=bool(found.get("use_dora")),
        bias=found.get("bias") or NONE,
        trainable_tokens=_tokens(found.get("trainable_token_indices")),
        rank_pattern=found.get("rank_pattern") or {},
        alpha_pattern=found.get("alpha_pattern") or {},
        base_model_name_or_path=found.get("base_model_name_or_path"),
        revision=found.get("revision"),
        task_type=found.get("task_type"),
        target_parameters=tuple(found.get("target_parameters") or ()),
        modules_to_save=tuple(found.get("modules_to_save") or ()),
    )


def _tokens(indices: Mapping[str, list[int]] | list[int] | None) -> tuple[int, ...]:
    return tuple(next(iter(indices.values()), ()) if isinstance(indices, Mapping) else indices or ())


def _shown(key: str, found: Mapping) -> str:
    text = repr(found[key])
    return f"`{key}: {text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + '…'}`"


def _in_order(content: bytes) -> bytes:
    """safetensors writes its metadata in random order: put in order, equal adapters are equal bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    text = json.dumps(header | {"__metadata__": dict(sorted(header["__metadata__"].items()))}, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text.encode() + content[end:]


def _repaired(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors under PEFT's names. Raises ModelError where two would get the same."""
    names = {name: _plain_name(name) for name in tensors}
    bent = [name for name, plain in names.items() if name != plain]
    if len(set(names.values())) < len(names):
        raise ModelError(
            Problem(
                f"several tensors stand for one factor, such as {bent[0]!r}",
                where=str(where),
                fix="save it again with PEFT's `save_pretrained`",
            )
        )
    if bent:
        log.warning("%s: %d names put right, such as %s -> %s", where, len(bent), bent[0], names[bent[0]])
    return {plain: tensors[name] for name, plain in names.items()}


def _without_copies(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Without the base's own embedding and head, which PEFT saves in full beside factors of them, and without the biases
    of modules trained whole, which it saves once more, as of its wrappers, where all biases are trained."""
    copies = [name for name in tensors if name.endswith(COPIES)]
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BIASES_AGAIN)}
    if copies:
        log.warning("%s: copies of the base's own weights are not read (%s): the base's are used", where, *copies[:1])
    return {name: tensor for name, tensor in tensors.items() if name not in copies}


def _plain_name(name: str) -> str:
    """`module.model.layers.0._orig_mod.q_proj.lora_A.default.weight` -> PEFT's own name of it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    name = PREFIX + name.removeprefix("module.").removeprefix(PREFIX)
    return re.sub(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.default(?=\.weight$|$)", r".\1", name)


def _identity(file: Path) -> tuple[Fingerprint | None, TokenizerFingerprint | None, dict | None, str | None]:
    """What the file says of the base, the tokenizer, where the adapter comes from, and which storage it completes."""
    metadata = read_metadata(file)
    readers = {
        FINGERPRINT: Fingerprint.from_json,
        TOKENIZER: TokenizerFingerprint.from_json,
        ORIGIN: _mapping,
        COMPLETES: _storage,
    }
    try:
        return tuple(read(metadata[key]) if metadata.get(key) else None for key, read in readers.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            Problem("the fingerprint of its base can't be read", where=str(file), fix="copy or train it again")
        ) from error


def _storage(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]{1,20}", text):
        raise ValueError(f"{text!r} is no storage")
    return text


def _mapping(text: str) -> dict:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise TypeError(f"a {type(found).__name__} is no JSON object")
    return found


def _extras(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """What is trained whole, by module: the outermost one whose path ends in one of the names, as PEFT finds it."""
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        parts = full.removeprefix(PREFIX).split(".")
        paths = [".".join(parts[:n]) for n in range(1, len(parts))]
        path = next((path for path in paths if path.endswith(tuple(names))), None)
        if path is not None and full.startswith(PREFIX) and ".lora_" not in full:
            found.setdefault(path, {})[full.removeprefix(f"{PREFIX}{path}.")] = tensor.to(torch.float32)
    return {path: found[path] for path in sorted(found)}


def _biases(tensors: Mapping[str, Tensor], bias: str) -> dict[str, tuple[str, Tensor]]:
    """The biases among the tensors: module -> (name in the file, tensor)."""
    if bias == NONE:
        return {}
    names = [name for name in tensors if name.startswith(PREFIX) and name.endswith(".bias")]
    paths = [name.removeprefix(PREFIX).removesuffix(".bias").removesuffix(".base_layer") for name in names]
    return {path: (name, tensors[name]) for path, name in sorted(zip(paths, names, strict=True))}


def _check_extras(extras: Mapping[str, Mapping[str, Tensor]], config: LoRAConfig, where: Path) -> None:
    """Raise ModelError for a module that the config names and the file lacks; of a classifier's heads, one is enough."""
    heads = HEADS if config.task_type == SEQ_CLS and extras else ()
    missing = [name for name in config.modules_to_save if not any(path.endswith(name) for path in extras)]
    if lacking := [name for name in missing if name not in heads]:
        what = f"the adapter lacks {', '.join(lacking)}, which its config names in modules_to_save"
        fix = "copy or train the adapter again: a part of it is not there"
        raise ModelError(Problem(what, where=str(where), fix=fix))


def _labels(file: Path, config: LoRAConfig, extras: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, ...]:
    """A classifier's labels; in files of PEFT, which keep none, transformers' `LABEL_0` … for each output of the head."""
    text = read_metadata(file).get(LABELS)
    if text is None and config.task_type == SEQ_CLS:
        outputs = [len(tensor) for state in extras.values() for tensor in state.values() if tensor.ndim == 2]
        return tuple(
            f"LABEL_{i}" for i in range(min(outputs, default=0))
        )  # of a head's matrices, the last is narrowest
    try:
        found = json.loads(text) if text else []
    except (ValueError, RecursionError):
        found = None
    if not _are_texts(found) or found is None or len(found) > MOST_LABELS:
        raise ModelError(Problem("its labels can't be read", where=str(file), fix="copy or train it again"))
    return tuple(found)


def _layers(
    tensors: Mapping[str, Tensor], config: LoRAConfig, where: Path
) -> tuple[dict[str, Factors], dict[str, Form]]:
    """The factors by path, and the forms of those that are no linear layer's."""
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        path, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not name.startswith(PREFIX) or part not in PARTS:
            strange.append(name)
        else:
            parts.setdefault(path, {})[part] = tensor.to(torch.float32)
    if strange or not parts:
        what = (
            f"{len(strange)} tensors that are no LoRA factors, first {strange[0]!r}"
            if strange
            else "no LoRA factors at all"
        )
        raise ModelError(
            Problem(f"the adapter holds {what}", where=str(where), fix="save it again with PEFT's `save_pretrained`")
        )
    layers: dict[str, Factors] = {}
    forms: dict[str, Form] = {}
    for path, found in sorted(_under_parameters(parts, config, where).items(), key=_natural):
        plain, form = _plain(found)
        if path in parts:
            layers[path] = _checked_factors(path, plain, config.at(path), where)
        else:
            layers |= _experts(path, plain, config.at(path).r, where)
        if form is not None:
            forms[path] = form
    return layers, forms


def _under_parameters(
    parts: Mapping[str, dict[str, Tensor]], config: LoRAConfig, where: Path
) -> dict[str, dict[str, Tensor]]:
    """The parts of experts under the paths of their parameters instead of PEFT's wrappers."""
    found, wrappers = {}, {}
    for path, part in parts.items():
        module = path.removesuffix(".base_layer" * (len(path.split(".base_layer")) - 1))
        names = [target.rpartition(".")[2] for target in config.target_parameters if _ends_in(module, target)]
        if names:
            wrappers.setdefault(module, (in_order_of_use(names), []))[1].append((path, part))
        else:
            found[path] = part
    for module, (names, wrapped) in wrappers.items():
        if len(names) != len(wrapped):
            what = f"{module} has factors for {len(wrapped)} parameters, and {CONFIG} names {', '.join(names)}"
            fix = "use the config and the weights of one and the same adapter"
            raise ModelError(Problem(what, where=str(where), fix=fix))
        innermost_first = sorted(wrapped, key=lambda item: -len(item[0]))
        found |= {f"{module}.{name}": part for name, (_, part) in zip(names, innermost_first, strict=True)}
    return found


def _ends_in(module: str, target: str) -> bool:
    """Whether `experts.down_proj` is a parameter of the module at `model.layers.0.mlp.experts`."""
    return f".{module}".endswith(f".{target.rpartition('.')[0]}")


def _plain(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Form | None]:
    """A layer's parts as those of a linear layer, and what it is where it is none."""
    if "lora_embedding_A" in found or "lora_embedding_B" in found:
        return {name.replace("_embedding", ""): tensor for name, tensor in found.items()}, Form(EMBEDDING)
    A = found.get("lora_A")
    if A is None or A.ndim < 3:
        return dict(found), None
    flat = {name: tensor.flatten() if "magnitude" in name else tensor.flatten(1) for name, tensor in found.items()}
    return flat, Form(CONVOLUTION, tuple(A.shape[2:]))


def _experts(path: str, found: Mapping[str, Tensor], r: int, where: Path) -> dict[str, Factors]:
    """The factors of each expert. Raises ModelError where they are not those of whole experts."""
    A, B = found.get("lora_A"), found.get("lora_B")
    if set(found) != {"lora_A", "lora_B"} or A.ndim != 2 or B.ndim != 2 or len(A) % r or len(A) != B.shape[1]:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(found.items()))
        what = f"{path} has {shapes}, and {CONFIG} says rank {r} for each of its experts"
        fix = "use the config and the weights of one and the same adapter"
        raise ModelError(Problem(what, where=str(where), fix=fix))
    each = zip(A.unflatten(0, (-1, r)), B.unflatten(1, (r, -1)).permute(2, 0, 1), strict=True)
    return {f"{path}[{i}]": Factors(A.contiguous(), B.contiguous()) for i, (A, B) in enumerate(each)}


def _checked_factors(path: str, found: Mapping[str, Tensor], config: LoRAConfig, where: Path) -> Factors:
    needed = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.use_dora else set())
    if missing := sorted(needed - set(found)):
        raise ModelError(
            Problem(
                f"{path} lacks {', '.join(missing)}",
                where=str(where),
                fix="copy or train the adapter again: a part of it is not there",
            )
        )
    if surplus := sorted(set(found) - needed):
        raise ModelError(
            Problem(
                f"{path} has a {surplus[0]}, and {CONFIG} does not say `use_dora: true`",
                where=str(where),
                fix="use the config and the weights of one and the same adapter",
            )
        )
    A, B, magnitude = found["lora_A"], found["lora_B"], found.get("lora_magnitude_vector")
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != config.r or B.shape[1] != config.r:
        raise ModelError(
            Problem(
                f"{path} has factors {tuple(A.shape)} and {tuple(B.shape)}, and {CONFIG} says rank {config.r}",
                where=str(where),
                fix="use the config and the weights of one and the same adapter",
            )
        )
    if magnitude is not None and magnitude.shape != B.shape[:1]:
        raise ModelError(
            Problem(
                f"{path} has a magnitude {tuple(magnitude.shape)} beside a lora_B {tuple(B.shape)}",
                where=str(where),
                fix="copy or train the adapter again",
            )
        )
    return Factors(A, B, magnitude)


def _read_config(folder: Path) -> dict:
    file = folder / CONFIG
    if not file.is_file():
        what, fix = "no adapter folder", "give the folder that `lora train` wrote to"
        if (folder / "config.json").is_file():
            what, fix = "a whole model, and no adapter", "give it with `--base`; `lora extract` makes an adapter of it"
        raise ModelError(Problem(f"no {CONFIG}: this is {what}", where=str(folder), fix=fix))
    return read_json(file, most_bytes=LARGEST_CONFIG_BYTES, fix="copy or train the adapter again")


def _no_weights(folder: Path) -> Exception:
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        return SafetyError(
            Problem(
                f"{pickles[0]} is a pickle, which can run code when it is read",
                where=str(folder),
                fix="load it with PEFT where that can do no harm, and `save_pretrained` it again as safetensors",
            )
        )
    return ModelError(Problem(f"no {WEIGHTS}", where=str(folder), fix="copy or train the adapter again"))


def _whole(number: float) -> float:
    """16.0 -> 16: some runtimes read lora_alpha as an integer."""
    return int(number) if number == int(number) else number


def _natural(item: tuple[str, object]) -> list:
    """layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in item[0].split(".")]
