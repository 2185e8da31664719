import io
import json
from dataclasses import replace

import pytest
import torch
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from lora_cli.cli import console
from lora_cli.cli.export import export
from lora_cli.cli.merge import _trained_in_nf4, merge, weights_bar
from lora_cli.cli.unmerge import unmerge
from lora_cli.errors import DataError, ModelError, RecipeError, SafetyError, StorageError, UserError
from lora_cli.lora.peft_format import load_adapter, save_adapter
from lora_cli.runs.proof_rows import write_proof_rows


@pytest.fixture
def run():
    app = typer.Typer()
    for command in (merge, unmerge, export):
        app.command()(command)

    def call(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        if isinstance(result.exception, UserError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


@pytest.fixture
def trained(tmp_path, base, adapter_of):
    """trained("llama", …) -> (base folder, adapter folder that names it)."""

    def make(name="llama", targets="all-linear", dtype=None, transposed=False, **settings):
        folder = base(name, dtype=dtype or torch.bfloat16)
        adapter = adapter_of(folder, targets, **settings)
        adapter = replace(adapter, config=replace(adapter.config, base_model_name_or_path=str(folder)))
        save_adapter(adapter, tmp_path / "out", transposed=transposed)
        return folder, tmp_path / "out"

    return make


def test_merge_finds_the_base_and_writes_into_the_run_folder(run, trained):
    folder, out = trained()

    text = run("merge", "--adapter", out)

    assert (out / "merged/model.safetensors").is_file()
    assert text.splitlines()[0] == f"merged   {out} into {folder}"
    assert [line.split(" ")[0] for line in text.splitlines() if line[0] != " "] == [
        "merged", "proof", "storage", "written"
    ]  # fmt: skip
    assert "less would be lost with `--dtype float32` 0.00%, `--dtype float16`" in text


def test_merge_speaks_json(run, trained):
    _, out = trained()

    found = json.loads(run("merge", "--adapter", out, "--dtype", "float32", "--json"))

    assert found["lost"] == 0
    assert found["dtypes"] == ["float32"]
    assert found["proof"]["largest_logit_difference"] < 1e-4
    assert found["proof"] == json.loads((out / "merged/merge.json").read_text())["report"]["proof"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.txt", "one line\n\nanother\n"), ("rows.jsonl", '{"text": "hello there"}\n')],
)
def test_merge_proves_on_the_rows_given(run, trained, tmp_path, name, content):
    _, out = trained()
    (tmp_path / name).write_text(content)

    found = json.loads(run("merge", "--adapter", out, "--data", tmp_path / name, "--json"))

    assert 0 < found["proof"]["positions"] < 40


def test_rows_that_cannot_be_read_are_named(run, trained, tmp_path):
    _, out = trained()
    (tmp_path / "rows.jsonl").write_text("{\n")

    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        run("merge", "--adapter", out, "--data", tmp_path / "rows.jsonl")
    assert not (out / "merged").exists()


def test_merge_refuses_what_it_cannot_do_with_the_class_of_its_exit_code(run, trained, tmp_path, base):
    _, out = trained()
    run("merge", "--adapter", out)

    with pytest.raises(StorageError, match="the output exists already"):
        run("merge", "--adapter", out)
    with pytest.raises(ModelError, match="this is no adapter folder"):
        run("merge", "--adapter", tmp_path)
    with pytest.raises(ModelError, match="merged into this base already"):
        run("merge", "--adapter", out, "--base", out / "merged", "--out", tmp_path / "twice")
    base("llama", seed=5)
    with pytest.raises(ModelError, match="the adapter was trained on another base"):
        run("merge", "--adapter", out, "--out", tmp_path / "other")
    assert "NOT the base" in run("merge", "--adapter", out, "--out", tmp_path / "other", "--allow-base-mismatch")


def test_a_pickled_adapter_is_refused(run, trained):
    _, out = trained()
    (out / "adapter_model.safetensors").rename(out / "adapter_model.bin")

    with pytest.raises(SafetyError, match="is a pickle"):
        run("merge", "--adapter", out)


def test_unmerge_says_how_exactly(run, trained, tmp_path):
    folder, out = trained()
    run("merge", "--adapter", out)

    text = run("unmerge", "--merged", out / "merged", "--adapter", out, "--out", tmp_path / "back", "--base", folder)

    assert "exactly  no weight can be further than " in text
    assert "measured against the base: " in text
    assert (tmp_path / "back/model.safetensors").is_file()


@pytest.mark.parametrize("merged", ["missing", "out/missing", "file"])
def test_unmerge_takes_nothing_but_a_folder(run, trained, tmp_path, monkeypatch, merged):
    _, out = trained()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelError, match=f"there is no such folder\n  --> {merged}\n") as error:
        run("unmerge", "--merged", merged, "--adapter", out, "--out", "back")
    assert "--merged" in error.value.problems[0].fix


def test_merge_proves_on_the_rows_that_the_run_kept(run, trained):
    _, out = trained()
    write_proof_rows(out, [list(range(3, 13)), list(range(20, 40))])

    found = json.loads(run("merge", "--adapter", out, "--json"))

    assert found["proof"]["positions"] == 30


def test_without_kept_rows_merge_proves_on_sentences_with_the_run_s_tokenizer(run, trained, tmp_path):
    folder, out = trained()
    for file in folder.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
        file.unlink()

    assert json.loads(run("merge", "--adapter", out, "--json"))["proof"]["positions"] > 100


@pytest.mark.parametrize("quantize", ["nf4", "int8", "none"])
def test_merging_what_was_trained_on_a_quantised_base_says_so_where_there_is_no_grid(trained, capsys, quantize):
    folder, out = trained()
    model = {"base": str(folder), "quantize": quantize, "dtype": "bfloat16"}
    (out / "recipe.yaml").write_text(yaml.safe_dump({"model": model, "data": {"train": "x.jsonl"}}))

    dtype = _trained_in_nf4(out, "auto")

    said = "the adapter was trained on the base quantised to int8; it is merged into the base as it is stored\n"
    assert capsys.readouterr().err == (said if quantize == "int8" else "")
    assert dtype == (torch.bfloat16 if quantize == "nf4" else None)


def test_a_recipe_that_cannot_be_read_does_not_stop_a_merge(run, trained):
    _, out = trained()
    (out / "recipe.yaml").write_text("tool: another\n")

    run("merge", "--adapter", out)

    assert (out / "merged/model.safetensors").is_file()


def test_nothing_moves_where_stderr_is_no_terminal_or_no_color_is_set(monkeypatch):
    for settings, moves in [({}, True), ({"no_color": True}, False), ({"force_terminal": False}, False)]:
        monkeypatch.setattr(console, "err", _terminal(**settings))

        with weights_bar("merging", then="proving") as progress:
            assert (progress is not None) is moves


def test_the_bar_makes_room_for_the_proof_when_all_is_written(monkeypatch):
    terminal = _terminal()
    monkeypatch.setattr(console, "err", terminal)

    with weights_bar("merging", then="proving") as progress:
        progress(1, 2)
        assert "proving" not in terminal.file.getvalue()
        progress(2, 2)
        progress(2, 2)
    _, shown, after = terminal.file.getvalue().partition("proving")
    assert shown
    assert "merging" not in after


@pytest.mark.parametrize(("name", "transposed"), [("llama", False), ("gpt2", True)])
def test_exported_to_peft_the_adapter_is_the_same_and_alone(run, trained, tmp_path, name, transposed):
    _, out = trained(name, transposed=transposed)
    (out / "events.jsonl").write_text("{}")

    text = run("export", "--adapter", out, "--to", "peft", "--out", tmp_path / "clean")

    assert "read back and equal, bit for bit" in text
    assert sorted(file.name for file in (tmp_path / "clean").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    assert (tmp_path / "clean/adapter_config.json").read_text() == (out / "adapter_config.json").read_text()
    assert load_adapter(tmp_path / "clean").digest() == load_adapter(out).digest()


def test_exported_to_merged_is_what_merge_writes(run, trained, tmp_path):
    _, out = trained()

    run("merge", "--adapter", out)
    run("export", "--adapter", out, "--to", "merged", "--out", tmp_path / "model")

    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (out / "merged" / name).read_bytes()


def test_an_unknown_format_is_refused_with_those_there_are(run, trained):
    _, out = trained()

    with pytest.raises(RecipeError, match="`--to` knows no format 'onnx'\n  fix: take one of peft, merged"):
        run("export", "--adapter", out, "--to", "onnx")


def _terminal(**settings) -> Console:
    return Console(**{"file": io.StringIO(), "force_terminal": True, "no_color": False} | settings, _environ={})


def test_the_commands_import_no_torch_before_they_need_it():
    import subprocess
    import sys

    code = "import sys, lora_cli.cli.merge, lora_cli.cli.unmerge, lora_cli.cli.export; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
