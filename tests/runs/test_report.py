"""The page of a run: made of its files, inert, and there however the run ended."""

import json
import re
import shutil
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from running import events, hashes, write_recipe

from lora_cli.lora.base_files import fingerprint
from lora_cli.runs.charts import charts_of
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.history import read_history
from lora_cli.runs.lock import locked
from lora_cli.runs.record import OF_MERGE
from lora_cli.runs.report import tell_merge, write_report

SETTINGS = {
    "training.max_steps": 6,
    "data.eval": "25%",
    "training.eval_steps": 2,
    "training.sample_prompts": ["what is the cat?"],
}
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!--",
    "]]>",
    "{{ 7 * 7 }}",
    "&lt;b&gt;",
    "\x1b[2J\x1b]8;;http://evil\x07",
    "\u202eevil\u2028\u2029\x00",
    "'\" onload='x",
    "\ud800",
]


class Page(HTMLParser):
    """A page as a browser takes it apart: its tags with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self.open = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag in ("script", "style"):
            self.scripts[attributes.get("type", tag)] = data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    """A run folder, to be copied by who changes it."""
    from lora_cli.recipe.reader import read_recipe
    from lora_cli.runs.train import execute, finish, prepare

    folder = tmp_path_factory.mktemp("run")
    loaded = read_recipe(write_recipe(folder, tiny_llama, SETTINGS))
    run_folder = RunFolder(folder / "out")
    with run_folder.held(resume=False, overwrite=False) as hold:
        run = prepare(loaded, run_folder)
        hold.begin()
        *_, finished = execute(run)
        finish(run, finished)
    return folder / "out"


@pytest.fixture
def copy(trained, tmp_path):
    """The files a report is made of, in a folder of this test."""
    for name in ("run.json", "events.jsonl", "recipe.yaml"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    return RunFolder(tmp_path)


def page_of(folder: RunFolder) -> Page:
    write_report(folder)
    return Page(folder.report.read_text(encoding="utf-8"))


def test_a_run_leaves_its_page_and_its_card(trained, tiny_llama):
    page = Page((trained / "report.html").read_text(encoding="utf-8"))

    first, last = (events(trained, "evaluated")[place]["loss"] for place in (0, -1))
    said = " ".join(page.text)
    assert f"from {first:.3f} to {last:.3f}" in said.replace("\u2011", "-")
    for part in ("Diagnosis", "Curves", "Samples", "Data", "Parameters", "Where it learned", "Proofs", "Recipe"):
        assert part in said
    assert "Frozen base unchanged" in said
    assert fingerprint(tiny_llama).short in said
    assert "what is the cat?" in said
    assert (trained / "README.md").is_file()


def test_the_page_asks_for_nothing_and_runs_nothing_but_its_own_script(trained):
    page = Page((trained / "report.html").read_text(encoding="utf-8"))

    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    digests = {name: b64encode(sha256(page.scripts[name].encode()).digest()).decode() for name in ("style", "script")}
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digests['style']}'; script-src 'sha256-{digests['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "href", "style", "srcset", "action"}
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"https?://|//\w", page.scripts["style"] + page.scripts["script"].replace("// ", ""))
    assert not {"link", "img", "iframe", "object", "form"} & {tag for tag, _ in page.tags}


def test_every_figure_of_a_step_has_its_curve(trained):
    titles = [chart.title for chart in charts_of(read_history(RunFolder(trained).events))]

    assert titles == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"]


def test_the_curves_can_be_read_off(trained):
    page = Page((trained / "report.html").read_text(encoding="utf-8"))
    charts = json.loads(page.scripts["application/json"])

    curve = next(line for line in charts[0]["lines"] if line["name"] == "training")
    assert curve["points"] == [
        [event["step"], pytest.approx(event["loss"], rel=1e-5)] for event in events(trained, "step")
    ]
    summaries = [
        attributes["aria-label"] for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes
    ]
    assert summaries[0].startswith("Loss: training from ")


def test_the_page_is_the_same_from_the_files_alone(trained, copy):
    write_report(copy)

    written, first = (folder.read_text(encoding="utf-8") for folder in (copy.report, trained / "report.html"))
    assert written.replace(str(copy.path), str(trained)) == first


def written_all_over(folder: RunFolder, text: str) -> None:
    """The text in every place of the record that has one, in samples, and as the name of a metric."""

    def replaced(value):
        if isinstance(value, str):
            return text
        if isinstance(value, list):
            return [replaced(inner) for inner in value]
        return {key: replaced(inner) for key, inner in value.items()} if isinstance(value, dict) else value

    record = json.loads(folder.record.read_text())
    merges = [{"out": text, "at": text, "lost": 0.1}]
    changed = replaced(record) | {"loosened": [text], "merges": merges, "environment": {text: text}}
    folder.record.write_text(json.dumps(changed | {"result": record["result"] | {"error": text}}))
    sample = {"event": "sampled", "step": 0, "samples": {text: text}}
    measured = {"event": "evaluated", "step": 6, "loss": 1.0, text: 0.5}
    with folder.events.open("a") as file:
        file.write(f"{json.dumps(sample)}\n{json.dumps(measured)}\n")


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_foreign_text_stays_text(trained, tmp_path, text):
    pages = []
    for place, each in enumerate(("word", text)):
        folder = RunFolder(tmp_path / str(place))
        folder.path.mkdir()
        for name in ("run.json", "events.jsonl"):
            (folder.path / name).write_bytes((trained / name).read_bytes())
        written_all_over(folder, each)
        pages.append(page_of(folder))
        written = folder.report.read_text(encoding="utf-8")
    harmless, page = pages

    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(names) for _, names in page.tags] == [sorted(names) for _, names in harmless.tags]
    assert json.loads(page.scripts["application/json"])
    assert not [c for c in written if ord(c) < 32 and c not in "\n\t"]
    assert not set(written) & set("\x7f\u202e\u2028\u2029")


def test_a_damaged_line_is_said_and_breaks_nothing(copy):
    with copy.events.open("a") as file:
        file.write('{"event": "step", "ste')

    assert "A line of events.jsonl could not be read" in " ".join(page_of(copy).text)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"data": 3, "machine": [], "merges": [1], "sessions": "x"}']
)
def test_a_damaged_record_still_gives_a_page(copy, content):
    copy.record.write_text(content)

    assert "Curves" in page_of(copy).text


def test_a_run_of_two_blocks_shows_where_it_learned(trained):
    record = json.loads((trained / "run.json").read_text())
    page = Page((trained / "report.html").read_text(encoding="utf-8"))

    assert sum(tag == "title" for tag, _ in page.tags) == 1 + len(record["adapter"]["updates"])
    assert all(norm > 0 for norm in record["adapter"]["updates"].values())


def test_a_diverged_run_tells_why_on_its_page(lora, recipe, tmp_path):
    lora("train", recipe({"training.learning_rate": 1e30}), code=6)

    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["result"]["exit_code"] == 6
    assert record["result"]["error"].startswith("error: 3 steps in a row could not be applied")
    assert "proofs" not in record
    said = " ".join(Page((tmp_path / "out/report.html").read_text(encoding="utf-8")).text)
    assert "The run diverged" in said
    assert "before its end" in said


def test_a_report_that_fails_does_not_hide_why_the_run_did(lora, recipe, tmp_path, monkeypatch):
    def broken(folder):
        raise OSError("the disk is full")

    monkeypatch.setattr("lora_cli.runs.report.write_report", broken)

    done = lora("train", recipe({"training.learning_rate": 1e30}), code=6)

    assert "warning: the report could not be written: the disk is full" in done.err
    assert "3 steps in a row could not be applied" in done.err


def test_a_resumed_run_is_reported_whole(lora, recipe, tmp_path):
    lora("train", recipe({"training.max_steps": 4}))
    out = tmp_path / "out"
    first = json.loads((out / "run.json").read_text())

    lora("train", recipe({"training.max_steps": 6}), "--resume")

    record = json.loads((out / "run.json").read_text())
    assert record["id"] == first["id"]
    assert [session["from_step"] for session in record["sessions"]] == [0, 4]
    assert all(session["started"] <= session["ended"] for session in record["sessions"])
    assert record["result"]["steps"] == 6


def test_a_merge_is_told_on_the_page_and_the_card(lora, recipe, tmp_path):
    lora("train", recipe())
    out = tmp_path / "out"

    for _ in range(2):  # a second merge to the same place takes the place of the first
        lora("merge", "--adapter", out, "--out", tmp_path / "merged")
        shutil.rmtree(tmp_path / "merged")

    [merge] = json.loads((out / "run.json").read_text())["merges"]
    assert merge["proof"]["same_top1"] == 1.0
    said = f"{tmp_path / 'merged'}"
    assert said in " ".join(Page((out / "report.html").read_text(encoding="utf-8")).text)
    assert said in (out / "README.md").read_text(encoding="utf-8")
    assert json.loads((out / "run.json").read_text())["result"]["steps"] == 4


def test_a_merge_of_another_adapter_or_under_a_lock_changes_nothing(copy):
    record = json.loads(copy.record.read_text())
    merge = {"adapter_sha256": record["adapter"]["sha256"], "out": "x"} | dict.fromkeys(OF_MERGE)
    before = hashes(copy.path)

    assert not tell_merge(copy, merge | {"adapter_sha256": "another"})
    assert not tell_merge(RunFolder(copy.path / "nowhere"), merge)
    with locked(copy.lock):
        assert not tell_merge(copy, merge)
        assert {**hashes(copy.path), "run.lock": ""} == {**before, "run.lock": ""}

    assert tell_merge(copy, merge)


def test_lora_report_writes_it_again(lora, trained, copy):
    done = lora("report", copy.path)

    assert copy.report.is_file()
    assert copy.card.is_file()
    assert done.out.endswith(f"written  {copy.report}\n")
    assert "few held-out tokens" in done.out
    assert lora("report", copy.path, "--json").json["findings"]


def test_lora_report_of_no_run_is_refused(lora, tmp_path):
    done = lora("report", tmp_path, code=4)

    assert "there is no run: no run.json" in done.err


def test_training_ends_with_the_diagnosis_in_at_most_three_lines(lora, recipe):
    done = lora("train", recipe())

    lines = [line for line in done.out.splitlines() if line.startswith(("· ", "! "))]
    assert 1 <= len(lines) <= 3
    assert "· nothing is held out: 4 steps without a held-out loss" in done.out
    assert "try --set data.eval=5%" in done.out
