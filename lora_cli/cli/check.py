"""`lora check`: what can be proved wrong with a recipe before GPU time is spent, on one page."""

from typing import Annotated

import typer

from lora_cli.cli.options import JsonOption, RecipeArgument, SetOption, TrustOption

SHOWN_LABELS = 20
BAR = 24  # characters of the longest
STYLES = {"fail": "bold red", "warn": "yellow", "ok": "green"}


def check(
    recipe: RecipeArgument,
    set_: SetOption = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="RUNTIMES",
            help="That shall serve the adapter, such as vllm,ollama: what they refuse is a fault.",
        ),
    ] = None,
    json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print faults and warnings alone.")] = False,
    trust_remote_code: TrustOption = None,
) -> None:
    """Prove recipe, rows, template, targets and disk before training.

    Example: lora check recipe.yaml
    """
    from lora_cli.cli.console import show_json
    from lora_cli.cli.tokenizing import tokenizing
    from lora_cli.export.runtimes import runtime_called
    from lora_cli.recipe.reader import read_recipe
    from lora_cli.runs.check import check as examine

    with tokenizing() as progress:
        runtimes = [runtime_called(name) for name in for_.split(",")] if for_ else []
        report = examine(read_recipe(recipe, set_ or []), progress, runtimes=runtimes)
    if json:
        show_json(_as_json(report))
    else:
        _show(report, quiet)
    raise typer.Exit(report.code)


def _show(report, quiet: bool) -> None:
    from lora_cli.cli.console import inert, show

    for finding in report.findings:
        if quiet and finding.level == "ok":
            continue
        show(f"{finding.level:<5} {finding.check:<11} {inert(finding.what)}", style=STYLES[finding.level])
        for mark, text in (("-->", finding.where), ("  |", finding.line), ("fix:", finding.fix)):
            if text and finding.level != "ok":
                show(f"      {mark} {inert(text)}")
    if report.figures and not quiet:
        show("")
        _show_figures(report.figures)
    show("")
    show(_verdict(report), style="bold")


def _show_figures(figures) -> None:
    from lora_cli.cli.console import inert, show

    lines = [
        ("rows", _rows(figures)),
        ("tokens", _tokens(figures)),
        *(("label", line) for line in _labels(figures)),
        *(("source", line) for line in _sources(figures)),
        ("length", _cut(figures)),
        *(("", line) for line in _bars(figures.histogram)),
        ("duplicates", _repeats(figures)),
        ("steps", _steps(figures)),
        *([("memory", _memory(figures.memory))] if figures.memory else []),
    ]
    for name, line in lines:
        show(f"{name:<11} {inert(line)}")


def _rows(figures) -> str:
    report = figures.report
    parts = [f"{report.rows:,} ({', '.join(sorted(set(report.formats.values())))})"]
    two = " (two a pair)" if "preference" in report.formats.values() else ""
    parts.append(f"{figures.train:,} examples{two} to train on, {figures.held_out:,} held out")
    parts += [f"{count:,} left out ({reason})" for reason, count in report.dropped.items()]
    return "; ".join(parts)


def _tokens(figures) -> str:
    if figures.report.labels:
        return f"{figures.tokens:,}"
    return f"{figures.tokens:,}, trained {figures.trained_tokens:,} ({figures.trained_tokens / figures.tokens:.1%})"


def _labels(figures) -> list[str]:
    labels = figures.report.labels
    total = sum(labels.values())
    lines = [f"{name}: {count:,} ({count / total:.1%})" for name, count in list(labels.items())[:SHOWN_LABELS]]
    return lines + ([f"… and {len(labels) - SHOWN_LABELS:,} more"] if len(labels) > SHOWN_LABELS else [])


def _sources(figures) -> list[str]:
    sources = figures.report.sources
    if len(sources) < 2:
        return []
    return [
        f"{name}: {found.examples:,} examples, {found.trained_tokens:,} trained tokens; {found.share:.1%} of an epoch"
        for name, found in sources.items()
    ]


def _cut(figures) -> str:
    report, lengths = figures.report, figures.report.lengths
    what = f"`max_length: {figures.max_length}` cuts {report.cut_rows:,} rows by {report.cut_tokens:,} tokens"
    return f"{what}; 95 / 99 / 100 % fit in {lengths.p95:,} / {lengths.p99:,} / {lengths.longest:,}"


def _bars(histogram) -> list[str]:
    most = max(bar.examples for bar in histogram)
    names = [f"{bar.least:,}–{bar.most:,}" if bar.most else f"{bar.least:,}–" for bar in histogram]
    width = max(map(len, names))
    return [
        f"{name:>{width}} {'█' * -(-BAR * bar.examples // most):<{BAR}} {bar.examples:,}"
        for name, bar in zip(names, histogram, strict=True)
    ]


def _repeats(figures) -> str:
    repeats = figures.repeats
    some = repeats.compared < figures.train + figures.held_out
    among = f" among the first {repeats.compared:,}" if some else ""
    text = f"{repeats.exact:,} exact, {repeats.near:,} near{among}"
    named = (f"{row} {'=' if place < repeats.exact else '≈'} {of}" for place, (row, of) in enumerate(repeats.pairs))
    return f"{text}: {', '.join(named)}" if repeats.pairs else text


def _steps(figures) -> str:
    text = f"{figures.steps:,} of {figures.examples_a_step} examples"
    if figures.filled is None:
        return text
    how = f"packed into rows of {figures.row_length:,} tokens" if figures.row_length else "padded"
    return f"{text}; {how}, forwards are {figures.filled:.0%} full"


def _memory(memory) -> str:
    from lora_cli.cli.console import bytes_text
    from lora_cli.models.recompute import described, recompute_of

    how = f"{memory.tokens:,} tokens a forward, checkpointing {described(recompute_of(memory.gradient_checkpointing))}"
    return f"a step needs about {bytes_text(memory.needed)} of {bytes_text(memory.free)} free: {how}"


def _verdict(report) -> str:
    fails, warnings = (len(report.of(level)) for level in ("fail", "warn"))
    counted = [
        f"{count} {name}{'s' * (count > 1)}" for count, name in ((fails, "fault"), (warnings, "warning")) if count
    ]
    return ("not ready to train" if fails else "ready to train") + (f": {', '.join(counted)}" if counted else "")


def _as_json(report) -> dict:
    from dataclasses import asdict

    return {
        "ready": report.code == 0,
        "code": report.code,
        "findings": [asdict(finding) for finding in report.findings],
        "figures": asdict(report.figures) if report.figures else None,
    }
