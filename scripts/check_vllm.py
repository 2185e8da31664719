"""What vLLM's own checks say of adapters, held against `lora check --for vllm`: every method on every weight; by hand.

    pip download --no-deps vllm==0.33.0            330 MB, of which the plain Python files are read and nothing is installed
    python scripts/check_vllm.py vllm-*.whl

From the wheel run: `PEFTHelper` (the config), `LoRAModel.from_local_checkpoint` (names and tensors), and, without being run,
the classes of models: whether they take adapters at all, and in an embedding. What they need of vLLM beside, its kernels
among it, is stood in for; that an adapter's answers are right is not looked at.
"""

import argparse
import ast
import importlib
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parent.parent
REAL = ("vllm.lora.peft_helper", "vllm.lora.lora_model", "vllm.lora.lora_weights", "vllm.lora.utils")
LARGEST_RANK = 512  # `--max-lora-rank`


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    with tempfile.TemporaryDirectory() as folder:
        sources = unpacked(wheel, Path(folder))
        sys.meta_path.insert(0, Beside(sources))
        models = Models(sources)
        without = sorted(models.without_lora())
        print(f"no adapters ({len(without)} kinds): {', '.join(without)}")
        without = sorted(models.without_embeddings())
        print(f"no adapted embeddings ({len(without)} kinds): {', '.join(without)}\n")
        return 1 if compared(models, Path(folder)) else 0


def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as opened:
        wanted = ("vllm/lora/", "vllm/model_executor/models/", "vllm/models/")
        opened.extractall(folder, [n for n in opened.namelist() if n.startswith(wanted) and n.endswith(".py")])
    return folder


class Beside:
    """An importer: the REAL modules from the wheel's files, and whatever else of vLLM as something that does nothing."""

    def __init__(self, sources: Path) -> None:
        self.sources = sources

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name in REAL:
            file = self.sources.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "vllm" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name, PIN_MEMORY=False)
        module.__path__, module.__spec__ = [], spec
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class Models:
    """The classes of models in vLLM's sources, by transformers' name of their kind."""

    def __init__(self, sources: Path) -> None:
        self.folder = sources / "vllm/model_executor/models"
        tree = ast.parse((self.folder / "registry.py").read_text())
        tables = {"_TEXT_GENERATION_MODELS", "_EMBEDDING_MODELS", "_SEQUENCE_CLASSIFICATION_MODELS"}
        self.architectures: dict[str, tuple[str, str]] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and node.targets[0].id in tables and isinstance(node.value, ast.Dict):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                        self.architectures[key.value] = ast.literal_eval(value)

    @cache  # noqa: B019  one object, for as long as the script runs
    def lineage(self, architecture: str) -> tuple[ast.ClassDef, ...]:
        """The class and those that it comes from, as far as they stand in vLLM's sources."""
        return tuple(self._classes(*self.architectures[architecture]))

    def _classes(self, module: str, name: str) -> Iterator[ast.ClassDef]:
        file = self.folder / f"{module}.py"
        if not file.is_file():
            return
        tree = ast.parse(file.read_text())
        own = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        imported = {
            alias.asname or alias.name: (node.module or "").rpartition(".")[2]
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        if name in own:
            yield own[name]
            for base in own[name].bases:
                yield from self._classes(module, getattr(base, "id", ""))
        elif name in imported:
            yield from self._classes(imported[name], name)

    def takes_adapters(self, architecture: str) -> bool | None:
        """None for what vLLM has no class of, and runs as transformers does."""
        if architecture not in self.architectures or not self.lineage(architecture):
            return None
        return any(getattr(base, "id", "") == "SupportsLoRA" for c in self.lineage(architecture) for base in c.bases)

    def constant(self, architecture: str, name: str) -> dict:
        """A dictionary of a class, or of the nearest class that it comes from and has it."""
        for found in self.lineage(architecture) if architecture in self.architectures else ():
            for node in found.body:
                named = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
                if getattr(named, "id", None) == name and node.value is not None:
                    return ast.literal_eval(node.value)
        return {}

    def without_lora(self) -> Iterator[str]:
        return (kind for kind, name in kinds() if self.takes_adapters(name) is False)

    def without_embeddings(self) -> Iterator[str]:
        return (k for k, name in kinds() if self.takes_adapters(name) and not self.constant(name, "embedding_modules"))


def kinds() -> list[tuple[str, str]]:
    """transformers' kinds of causal language models, and the class of each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())


def compared(models: Models, folder: Path) -> int:
    """Prints the cells in which vLLM and `lora check` differ; returns their number."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/lora")]
    from layers import MAKERS, randomize
    from method_by_weight import METHODS, WEIGHTS, WITHOUT
    from test_method_by_weight import with_adapter
    from tiny import tiny_base

    from lora_cli.lora.adapter import Adapter
    from lora_cli.lora.peft_format import save_adapter

    base, cells, differ = tiny_base(folder / "base", "qwen2"), 0, 0
    for weight, row in WEIGHTS.items():
        for method in METHODS:
            if (weight, method) in WITHOUT or row.model in MAKERS or row.quantize == "torchao":
                continue
            model, config, _ = with_adapter(weight, method, base)
            randomize(model)
            adapter = Adapter.of(model, config)
            save_adapter(adapter, folder / "adapter", transposed=False)
            theirs, ours = refused_by_vllm(models, model, folder / "adapter"), refused_by_us(adapter, model)
            cells += 1
            if bool(theirs) != bool(ours):
                differ += 1
                print(f"{weight}, {method}:\n  vLLM: {theirs or 'takes it'}\n  lora: {ours or 'takes it'}")
    print(f"{cells} cells, {cells - differ} alike")
    return differ


def refused_by_us(adapter, model) -> str:
    from lora_cli.export.runtimes import Subject, findings

    found = findings("vllm", Subject.of(adapter, model.config))
    return "; ".join(each.what for each in found if each.verdict.outcome == "refused")


def refused_by_vllm(models: Models, model, folder: Path) -> str:
    """What its classes and checks say, in the order in which it asks them; '' where it would load the adapter."""
    from torch import nn
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    name = type(model).__name__
    if models.takes_adapters(name) is False:
        return f"{name} does not support LoRA"
    packed = models.constant(name, "packed_modules_mapping")
    paths = (p.removesuffix(".base") for p, m in model.named_modules() if isinstance(m, nn.Linear))
    linears = {path.rpartition(".")[2] for path in paths} - {"lm_head"}
    known = {
        *linears,
        *models.constant(name, "embedding_modules"),
        *packed,
        *(n for each in packed.values() for n in each),
    }
    if any(path.endswith("experts") for path, _ in model.named_modules()):
        known.add("experts")
    try:
        helper = PEFTHelper.from_local_dir(str(folder), None)
        helper.validate_legal(SimpleNamespace(max_lora_rank=LARGEST_RANK))
        LoRAModel.from_local_checkpoint(str(folder), known, helper, lora_model_id=1, device="cpu")
    except (ValueError, RuntimeError, KeyError) as error:
        return str(error).replace(str(folder), "")[:160]
    return ""


if __name__ == "__main__":
    sys.exit(main())
