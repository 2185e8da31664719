"""sweep.html: one file that asks for nothing, whatever the runs are called, made of whatever they came to."""

import json
import re

from lora_cli.recipe.grid import Trial
from lora_cli.runs.folder import RunFolder
from lora_cli.runs.outcomes import Outcome, Planned, exit_code, ranked, read_outcome
from lora_cli.runs.sweep_page import sweep_page


def outcome(name: str, folder, **changed) -> Outcome:
    values = {
        "name": name, "settings": {"lora.r": name}, "folder": str(folder), "state": "finished", "error": None, "exit_code": 0,
        "step": 9, "steps": 9, "best_step": 6, "loss": 1.5, "first_loss": 2.0, "train_loss": 1.4, "parameters": 1000,
        "seconds": 3.0, "peak_bytes": 1e6,
    }  # fmt: skip
    return Outcome(**values | changed)


def test_the_page_runs_nothing_but_its_own_and_fetches_nothing(tmp_path):
    found = sweep_page([outcome("</script><script>alert(1)</script>", tmp_path)])

    assert "<script>alert" not in found
    assert "default-src &#39;none&#39;" in found
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", found)


def test_the_best_comes_first_and_what_did_not_finish_last(tmp_path):
    runs = [
        outcome("a", tmp_path, loss=2.0),
        outcome("b", tmp_path, loss=0.1, state="interrupted"),
        outcome("c", tmp_path),
    ]

    assert [run.name for run in ranked(runs)] == ["c", "a", "b"]


def test_runs_without_a_folder_have_a_page_too(tmp_path):
    waiting = read_outcome(Planned(Trial("a", {"lora.r": "2"}), None, RunFolder(tmp_path / "none")))

    assert waiting.state == "waiting"
    assert "No run has finished." in sweep_page([waiting])


def test_a_run_that_diverges_is_an_answer_and_any_other_failure_is_told(tmp_path):
    done, diverged = outcome("a", tmp_path), outcome("b", tmp_path, state="diverged", exit_code=6)
    full = outcome("c", tmp_path, state="broken off", exit_code=5)

    assert exit_code([done, diverged]) == 0
    assert exit_code([diverged]) == 6
    assert exit_code([done, full]) == 5


def test_the_curves_are_those_of_the_runs(tmp_path):
    lines = [{"event": "evaluated", "step": step, "loss": 2.0 - step / 10} for step in (0, 5, 9)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    found = sweep_page([outcome("r=2", tmp_path)])

    charts = json.loads(re.search(r'id="charts">(.*?)</script>', found)[1])
    assert charts[0]["lines"] == [{"name": "r=2", "points": [[0, 2.0], [5, 1.5], [9, 1.1]]}]
