"""Trackers hear what events.jsonl holds, and never end a run."""

import logging
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
from accelerate import Accelerator

from lora_cli.errors import RecipeError
from lora_cli.recipe.schema import Training
from lora_cli.train.events import Evaluated, Sampled, Saved, Step
from lora_cli.train.trackers import TRACKERS, Tracked, check_trackers, metrics_of, open_tracker

EVENTS = [
    Evaluated(0, 4.0, 54.6, 100, best=True),
    Sampled(0, {"What?": "That."}),
    Step(1, 3.5, 1e-4, 0.5, tokens=10, tokens_per_second=100.0, seconds=1.0, peak_bytes=10),
    Step(2, 3.0, 2e-4, 0.4, tokens=20, tokens_per_second=200.0, seconds=2.0, peak_bytes=10),
    Saved(2, "out"),
]
SETTINGS = {"lora.r": 8, "lora.targets": ["q_proj"], "data.eval": None}


@pytest.fixture
def run(tmp_path):
    Accelerator()  # its trackers ask it whether this is the main process
    return Tracked(tmp_path / "out", "0123456789abcdef", SETTINGS)


class Told(ModuleType):
    """A module in a tracker's place: every call of any of its functions is kept, with its arguments."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **named):
            self.calls.append((name, arguments, named))
            return SimpleNamespace(
                log=lambda values, step=None: self.calls.append(("log", (values,), {"step": step})),
                finish=lambda: self.calls.append(("finish", (), {})),
            )

        return call

    def all_of(self, name):
        return [(arguments, named) for called, arguments, named in self.calls if called == name]


@pytest.fixture
def told(monkeypatch):
    """told("wandb") -> a module that keeps what it is told, where the package would be."""

    def put(name, **parts):
        module = Told(name)
        for part, value in parts.items():
            setattr(module, part, value)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    for row in TRACKERS.values():
        for variable in row.environment:
            monkeypatch.setenv(variable, "")
    return put


def tell(name, run, events=EVENTS):
    with open_tracker(name, run) as sink:
        for event in events:
            sink(event)


def test_every_tracker_of_the_recipe_has_a_row():
    annotation = Training.model_fields["trackers"].annotation

    assert set(TRACKERS) == set(annotation.__args__[0].__args__)


def test_figures_are_grouped_as_trackers_group_them():
    class WithSources(Step):
        def as_json(self):
            return super().as_json() | {"sources": {"a": 1.5}, "text": "no figure"}

    step = WithSources(3, 2.0, 1e-4, 0.5, tokens=10, tokens_per_second=9.0, seconds=1.0, peak_bytes=10)

    assert metrics_of(step) == {
        "train/loss": 2.0,
        "train/lr": 1e-4,
        "train/grad_norm": 0.5,
        "train/tokens": 10,
        "train/tokens_per_second": 9.0,
        "train/peak_bytes": 10,
        "train/sources/a": 1.5,
    }
    assert metrics_of(EVENTS[0]) == {"eval/loss": 4.0, "eval/perplexity": 54.6, "eval/tokens": 100}
    assert metrics_of(EVENTS[-1]) == {}


def test_wandb_is_told_everything_but_what_it_would_collect(told, run):
    config = Told("config")
    wandb = told("wandb", config=config)

    tell("wandb", run)

    [(_, opened)] = wandb.all_of("init")
    assert (opened["project"], opened["id"], opened["resume"], opened["dir"]) == ("lora", run.id, "allow", run.folder)
    assert opened["settings"]["x_disable_meta"] is True
    assert opened["settings"]["disable_git"] is True
    assert config.calls == [("update", (SETTINGS,), {"allow_val_change": True})]
    assert wandb.all_of("Table")[0][1]["data"] == [["What?", "That."]]
    steps = [(named["step"], values.get("train/loss")) for (values,), named in wandb.all_of("log")]
    assert steps == [(0, None), (0, None), (1, 3.5), (2, 3.0)]
    assert wandb.calls[-1][0] == "finish"


def test_trackio_is_told_everything(told, run):
    config = Told("config")
    trackio = told("trackio", config=config)

    tell("trackio", run)

    [(_, opened)] = trackio.all_of("init")
    assert (opened["project"], opened["name"], opened["resume"]) == ("lora", "out-01234567", "allow")
    assert config.all_of("update")
    assert trackio.all_of("Table")[0][1]["data"] == [["What?", "That."]]
    assert [named["step"] for _, named in trackio.all_of("log")] == [0, 0, 1, 2]
    assert trackio.calls[-1][0] == "finish"


def test_mlflow_is_told_everything_and_settings_once(told, run, monkeypatch):
    mlflow = told("mlflow")
    mlflow.search_experiments = lambda **named: []
    mlflow.utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
    monkeypatch.delenv("MLFLOW_TAGS", raising=False)

    tell("mlflow", run)

    [(_, opened)] = mlflow.all_of("start_run")
    assert opened["tags"] == {"lora.run": run.id}
    [((settings,), _)] = mlflow.all_of("log_params")
    assert settings == {key: str(value) for key, value in SETTINGS.items()}
    assert [named["step"] for _, named in mlflow.all_of("log_metrics")] == [0, 1, 2]
    assert mlflow.all_of("log_dict") == [(({"What?": "That."}, "samples/step-0000000.json"), {})]


@pytest.mark.parametrize("log_steps", [1, 2, 5])
def test_steps_are_told_as_often_as_the_recipe_says(told, run, log_steps):
    wandb = told("wandb", config=Told("config"))
    steps = [Step(n, 1.0, 1e-4, 0.5, tokens=n, tokens_per_second=1.0, seconds=1.0, peak_bytes=10) for n in range(1, 11)]

    tell("wandb", Tracked(run.folder, run.id, {}, log_steps=log_steps), steps)

    assert [named["step"] for _, named in wandb.all_of("log")] == list(range(log_steps, 11, log_steps))


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_makes_one_warning_and_no_more(told, run, caplog, where):
    def broken(*arguments, **named):
        raise ConnectionError("the network is down\nsecond line")

    log = broken if where == "log" else lambda values, step=None: None
    finish = broken if where == "finish" else lambda: None
    opened = broken if where == "init" else lambda **named: SimpleNamespace(log=log, finish=finish)
    told("wandb", config=Told("config"), init=opened)

    with caplog.at_level(logging.WARNING, logger="lora_cli"):
        tell("wandb", run)

    assert [record.getMessage() for record in caplog.records] == ["wandb is told nothing more: the network is down"]


def test_a_tracker_prints_nothing_on_stdout(told, run, capsys):
    told("wandb", config=Told("config"), init=lambda **named: print("welcome"))

    with open_tracker("wandb", run):
        pass

    printed = capsys.readouterr()
    assert printed.out == ""
    assert "welcome" in printed.err


def test_missing_packages_are_named_at_once_with_their_extras(monkeypatch):
    monkeypatch.setattr("lora_cli.train.trackers.find_spec", lambda name: None)

    with pytest.raises(RecipeError) as raised:
        check_trackers(["wandb", "mlflow"])

    assert [problem.fix for problem in raised.value.problems] == [
        "pip install 'lora-cli[wandb]', or leave the tracker out",
        "pip install 'lora-cli[mlflow]', or leave the tracker out",
    ]


def test_tensorboard_gets_curves_settings_and_samples(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell("tensorboard", run)

    read = EventAccumulator(str(run.folder / "tensorboard"))
    read.Reload()
    assert [(point.step, point.value) for point in read.Scalars("train/loss")] == [(1, 3.5), (2, 3.0)]
    tags = read.Tags()
    assert {"settings/text_summary", "samples/1/text_summary"} <= set(tags["tensors"])
    assert [path.is_file() for path in (run.folder / "tensorboard").iterdir()] == [True]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_offline(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")

    tell("wandb", run)

    assert list(run.folder.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
@pytest.mark.filterwarnings("ignore")
def test_trackio_writes_its_database(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    tell("trackio", run)

    assert list((tmp_path / "trackio").glob("*.db"))


@pytest.mark.skipif(find_spec("sqlalchemy") is None or find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_goes_on_with_the_run_of_an_earlier_session(run, monkeypatch, tmp_path):
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    tell("mlflow", run)

    later = Step(3, 2.5, 2e-4, 0.4, tokens=30, tokens_per_second=200.0, seconds=3.0, peak_bytes=10)
    tell("mlflow", Tracked(run.folder, run.id, SETTINGS | {"lora.r": 16}, resumed_at=2), [later])

    [found] = mlflow.search_runs(experiment_names=["lora"], output_format="list")
    curve = mlflow.MlflowClient().get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 3.5), (2, 3.0), (3, 2.5)]
