"""How fast rows become tokens, next to the bare tokenizer on the same texts and the same cores.

    python scripts/bench_tokenize.py models/SmolLM2-135M-Instruct.gguf --megabytes 100

Writes conversations and completions of words of the Jargon File, tokenizes them as `lora train` does (into an empty
cache, then from it), and then the texts of the examples by one `tokenizer(batch)` after another, which uses all cores.
Prints the time on the clock and the time of the processors, workers with it, which other work on the machine disturbs
least; rows/s and tokens/s of the clock; the ratio of the processors' times; and the memory of the first process.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lora_cli.data.pipeline import load_examples
from lora_cli.models.base import resolve_base
from lora_cli.models.load import load_tokenizer

WORDS = Path(__file__).resolve().parent.parent / "recipes/jargon/jargon.jsonl"
MAX_LENGTH = 2048
BATCH = 1000  # texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a folder, hub id or GGUF file with a tokenizer")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(resolve_base(arguments.base, None, weights=False).folder)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            file = Path(folder) / "rows.jsonl"
            megabytes = write(file, kind, arguments.megabytes)
            measure(kind, file, megabytes, tokenizer)


def write(file: Path, kind: str, megabytes: float) -> float:
    """Rows of the kind until the file is that large; returns how large it is."""
    rows, size = KINDS[kind](random.Random(0)), 0
    with file.open("w") as opened:
        while size < megabytes * 1e6:
            size += opened.write(json.dumps(next(rows)) + "\n")
    return file.stat().st_size / 1e6


def measure(kind: str, file: Path, megabytes: float, tokenizer) -> None:
    def load():
        return load_examples(file.name, folder=file.parent, tokenizer=tokenizer, max_length=MAX_LENGTH)

    first, (examples, report) = timed(load)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    again, _ = timed(load)
    each = [timed(bare_tokenizer(tokenizer, texts))[0] for texts in batches(examples, tokenizer)]
    bare = Seconds(*map(sum, zip(*each, strict=True)))
    print(f"{kind}: {megabytes:.0f} MB, {report.rows:,} rows, {report.tokens:,} tokens, {os.cpu_count()} cores")
    for name, (clock, processors) in (("lora", first), ("lora, from the cache", again), ("tokenizer(batch)", bare)):
        print(
            f"  {name:<22} {clock:7.2f} s  {processors:7.2f} s of processors  {report.rows / clock:10,.0f} rows/s  "
            f"{report.tokens / clock:12,.0f} tokens/s  {processors / bare.processors:5.2f} ×"
        )
    print(f"  memory at most         {memory:7.0f} MB")


def bare_tokenizer(tokenizer, texts: list[str]):
    return lambda: tokenizer(texts, add_special_tokens=False, return_attention_mask=False)


def batches(examples, tokenizer) -> Iterator[list[str]]:
    for start in range(0, len(examples), BATCH):
        yield tokenizer.decode([example.input_ids for example in examples[start : start + BATCH]])


class Seconds(NamedTuple):
    clock: float
    processors: float


def timed(call):
    began, used = time.perf_counter(), processors()
    found = call()
    return Seconds(time.perf_counter() - began, processors() - used), found


def processors() -> float:
    """Seconds that this process and the ones it has ended have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def chat(random: random.Random) -> Iterator[dict]:
    """Two questions and two answers."""
    say = sayer(random)
    while True:
        turns = [("user", 30), ("assistant", 60), ("user", 20), ("assistant", 70)]
        yield {"messages": [{"role": role, "content": say(count)} for role, count in turns]}


def completion(random: random.Random) -> Iterator[dict]:
    say = sayer(random)
    while True:
        yield {"prompt": say(60), "completion": " " + say(120)}


def text(random: random.Random) -> Iterator[dict]:
    say = sayer(random)
    while True:
        yield {"text": say(300)}


def sayer(random: random.Random):
    """say(n) -> about n words, one behind the other as they stand in the Jargon File, beginning anywhere."""
    words = " ".join(json.loads(line)["output"] for line in WORDS.read_text().splitlines()).split(" ")

    def say(count: int) -> str:
        count = max(1, int(count * random.uniform(0.5, 1.5)))
        start = random.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    return say


KINDS = {"chat": chat, "completion": completion, "text": text}


if __name__ == "__main__":
    main()
