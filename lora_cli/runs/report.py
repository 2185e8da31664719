"""report.html: a run on one page, made of its files alone (run.json, events.jsonl, and merge.json of a merged model).

The page is one file that asks for nothing: its style and its script are the only ones it may run (a policy names their
hashes), its figures are data, and every text that others wrote stays text.
"""

import json
import logging
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any

from lora_cli.errors import StorageError, first_line
from lora_cli.runs import record as records
from lora_cli.runs.card import write_card
from lora_cli.runs.charts import Chart, charts_of
from lora_cli.runs.diagnosis import Finding, diagnose
from lora_cli.runs.facts import facts, get
from lora_cli.runs.folder import RunFolder, write_text
from lora_cli.runs.history import History, read_history
from lora_cli.runs.lock import locked
from lora_cli.wording import inert

log = logging.getLogger(__name__)

PAGE = files("lora_cli.runs") / "page"
# <, > and & can't end the script or begin a comment; U+2028 and U+2029 are line ends to old parsers
IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


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
    from jinja2 import Environment, StrictUndefined

    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    charts = charts_of(report.history)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_inert
    )
    template = environment.from_string((PAGE / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        style=_verbatim(style),
        script=_verbatim(script),
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'",
        data_of_charts=_verbatim(json.dumps(_readable(charts), separators=(",", ":")).translate(IN_SCRIPT)),
        charts=charts,
        findings=report.findings,
        **facts(report.folder.path, report.record, report.history),
    )


def _readable(charts: list[Chart]) -> list[dict[str, Any]]:
    """What the page's script reads off: the points of each line that is not drawn twice."""
    return [
        {
            "last": each.last,
            "digits": each.digits,
            "lines": [
                {"name": inert(line.name), "points": [[step, float(f"{value:.6g}")] for step, value in line.points]}
                for line in each.lines
                if "dots" not in line.look
            ],
        }
        for each in charts
    ]


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _verbatim(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)  # ours, or escaped by IN_SCRIPT


def _inert(value: Any) -> Any:
    """What the template prints: every text but our own with its control characters written out."""
    from markupsafe import Markup

    return inert(value) if isinstance(value, str) and not isinstance(value, Markup) else value
