"""Pages: one file each, which asks for nothing.

Its style and its script are the only ones it may run (a policy names their hashes), its figures are data, and every text
that others wrote stays text.
"""

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

from lora_cli.runs.charts import Chart
from lora_cli.wording import inert

PAGE = files("lora_cli.runs") / "page"
# <, > and & can't end the script or begin a comment; U+2028 and U+2029 are line ends to old parsers
IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render(template: str, charts: Sequence[Chart], **values: Any) -> str:
    """The template filled in, with what its charts need to be read off."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    style, script = _text("report.css"), _text("report.js")
    environment = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_inert,
    )
    return environment.get_template(template).render(
        style=_verbatim(style),
        script=_verbatim(script),
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'",
        data_of_charts=_verbatim(json.dumps(_readable(charts), separators=(",", ":")).translate(IN_SCRIPT)),
        charts=charts,
        **values,
    )


def _text(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _readable(charts: Sequence[Chart]) -> list[dict[str, Any]]:
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
