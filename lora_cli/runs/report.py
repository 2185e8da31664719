"""report.html: a run on one page, made of its files alone (run.json, events.jsonl, and merge.json of a merged model)."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_cli.errors import StorageError, first_line
from lora_cli.runs import record as records
from lora_cli.runs.card import write_card
from lora_cli.runs.charts import charts_of
from lora_cli.runs.diagnosis import Finding, diagnose
from lora_cli.runs.facts import facts, get
from lora_cli.runs.folder import RunFolder, write_text
from lora_cli.runs.history import History, read_history
from lora_cli.runs.lock import locked
from lora_cli.runs.pages import render

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """A run as its files tell it."""

    folder: RunFolder
    record: Mapping[str, Any]
    history: History
    findings: tuple[Finding, ...]


def read_report(folder: RunFolder) -> Report:
    record, history = folder.read_record(), read_history(folder.events)
    return Report(folder, record, history, tuple(diagnose(history, record)))


def write_report(folder: RunFolder) -> Report:
    """report.html and README.md, made anew from the run's files."""
    report = read_report(folder)
    write_text(folder.report, page(report))
    write_card(folder, report.record, report.history)
    return report


def tell_merge(folder: RunFolder, merge: Mapping[str, Any]) -> bool:
    """Add a merge of this run's adapter to its record, its page and its card; `merge` is a MergeReport as JSON has it.

    False, and nothing is written, where the folder is no finished run of that adapter, or not ours to write to.
    """
    record = folder.read_record()
    if get(record, "adapter", "sha256") != merge["adapter_sha256"]:
        return False
    try:
        with locked(folder.lock):
            records.write_record(folder, records.merged(record, merge))
            write_report(folder)
    except (OSError, StorageError) as error:
        log.info("the merge is not on the run's page: %s", first_line(error))
        return False
    return True


@contextmanager
def told_if_broken_off(folder: RunFolder) -> Iterator[None]:
    """What ends a run before its end goes into its record and on its page; then it goes on as it was raised."""
    try:
        yield
    except GeneratorExit:
        raise
    except BaseException as error:
        try:
            tell_end(folder, records.why_broken_off(error))
        except Exception as second:  # the first one matters
            log.warning("the report could not be written: %s", first_line(second))
        raise


def tell_end(folder: RunFolder, why: Mapping[str, Any]) -> None:
    """The end of a run before its end, in its record and on its page."""
    records.write_record(folder, records.broken_off(folder.read_record(), read_history(folder.events), why))
    write_report(folder)


def page(report: Report) -> str:
    return render(
        "report.html.jinja",
        charts_of(report.history),
        findings=report.findings,
        **facts(report.folder.path, report.record, report.history),
    )
