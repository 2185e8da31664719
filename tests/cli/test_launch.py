"""Several processes: how they start, how a run ends when one of them ends, and what a launcher may not change."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from running import ROOT, adapter_bytes, events, free_port, lora_process
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from lora_cli.cli import launch, profiles
from lora_cli.cli.profiles import Profile, profile_folders, read_profile
from lora_cli.cli.slurm import first_host, worker_of_srun
from lora_cli.cli.worker import ERRORS
from lora_cli.errors import DistributedError, RecipeError, SafetyError, is_out_of_memory
from lora_cli.train.events import OutOfMemory
from lora_cli.train.parallel import agree, make_accelerator
from lora_cli.train.sharding import Sharding, asked_for, not_done

STEP = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1234", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}


@pytest.fixture
def anew(monkeypatch):
    """Accelerate reads its environment once a process: forget what it has read, before and after."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


@pytest.fixture
def launched(monkeypatch):
    """launched(error, gpus=0) -> the arguments of the workers; starting them raises the error."""

    def launch_as(error: Exception | None = None, gpus: int = 0) -> list[str]:
        started = []

        def start(*arguments):
            started.extend(arguments)
            if error:
                raise error

        monkeypatch.setenv(ERRORS, "")
        monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda config, program: start)
        monkeypatch.setattr(launch, "_visible_gpus", lambda: gpus)
        return started

    return launch_as


def start_process(*arguments: object, **environment: str) -> subprocess.Popen:
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-m", "lora_cli", *map(str, arguments)],
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers_in_training(process: subprocess.Popen, out: Path) -> dict[int, psutil.Process]:
    """The workers by rank, as soon as the run has taken a step."""
    for _ in range(1200):
        if (out / "events.jsonl").is_file() and events(out, "step"):
            return {int(worker.environ()["RANK"]): worker for worker in psutil.Process(process.pid).children()}
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no step in two minutes")


def assert_gone(workers):
    for worker in workers.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            assert worker.status() == psutil.STATUS_ZOMBIE


def test_the_launchers_precision_and_accumulation_change_nothing(lora, recipe, tmp_path, anew):
    lora("train", recipe(), "--out", tmp_path / "plain")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    anew.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    anew.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    anew.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")

    lora("train", recipe(), "--out", tmp_path / "launched")

    assert adapter_bytes(tmp_path / "launched") == adapter_bytes(tmp_path / "plain")
    losses = [[event["loss"] for event in events(tmp_path / name, "step")] for name in ("plain", "launched")]
    assert losses[0] == losses[1]


def test_a_prepared_model_computes_in_its_own_precision(anew):
    anew.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    linear, x = torch.nn.Linear(64, 64), torch.randn(8, 64)
    expected = linear(x)

    prepared = make_accelerator().prepare(linear)

    assert torch.equal(prepared(x), expected)


@pytest.mark.parametrize(
    ("variable", "name"),
    [("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")],
)
def test_what_is_neither_data_parallel_nor_fsdp_is_refused(variable, name, lora, recipe, anew):
    anew.setenv(variable, "true")

    done = lora("train", recipe(), code=2)

    assert done.err.startswith(
        f"error: training with {name} is not supported\n  fix: use `distributed_type: MULTI_GPU`"
    )


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "FSDP_VERSION",
            "1",
            "`fsdp_version: 1` of the launcher is not supported\n  --> FSDP_VERSION\n  fix: set `fsdp_version: 2`",
        ),
        ("FSDP_VERSION", "", "`fsdp_version: 1` of the launcher"),
        ("FSDP_OFFLOAD_PARAMS", "true", "`fsdp_offload_params: true` of the launcher"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "`fsdp_reshard_after_forward: false` of the launcher"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "`fsdp_auto_wrap_policy: SIZE_BASED_WRAP` of the launcher"),
    ],
)
def test_what_accelerates_launcher_asks_of_fsdp_and_would_not_get_is_refused(variable, value, said, lora, recipe, anew):
    for name, default in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", variable: value}.items():
        anew.setenv(name, default)

    assert lora("train", recipe(), code=2).err.startswith(f"error: {said}")


def test_what_accelerates_launcher_sets_by_itself_is_taken():
    asked = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_MIN_NUM_PARAMS": "100000000",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer, LlamaMLP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    }

    assert list(not_done(asked)) == []
    assert asked_for(asked) == Sharding(("LlamaDecoderLayer", "LlamaMLP"))
    assert asked_for(asked | {"ACCELERATE_USE_FSDP": "false"}) is None
    assert asked_for(Sharding(("A", "B")).environment()) == Sharding(("A", "B"))


def test_processes_agree_or_the_values_that_differ_are_named():
    class Two:
        device = torch.device("cpu")

        def __init__(self, other):
            self.other = other

        def gather(self, mine):
            return torch.cat([mine, self.other if self.other is not None else mine])

    class Seen(Two):
        def gather(self, mine):
            self.mine = mine
            return mine

    other = Seen(None)
    agree(other, {"step": 3, "rows": "ab", "steps": 9})

    agree(Two(other.mine), {"step": 3, "rows": "ab", "steps": 9})
    with pytest.raises(DistributedError, match="do not agree on step, steps\n"):
        agree(Two(other.mine), {"step": 4, "rows": "ab", "steps": 8})


def test_one_process_agrees_with_itself(anew):
    agree(make_accelerator(), {"step": 3})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node01", "node01"),
        ("node[01-03,07]", "node01"),
        ("gpu-a[7,9-12],node1", "gpu-a7"),
        ("rack[2-3]node[04-05]-ib,x", "rack2node04-ib"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_a_task_of_srun_has_torchs_variables():
    task = STEP | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "7", "SLURM_NODEID": "2"}
    task |= {"SLURM_STEP_NODELIST": "node[03-06]", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}

    assert worker_of_srun(task) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node03",
        "MASTER_PORT": "16234",
    }
    assert (
        worker_of_srun(task | {"MASTER_PORT": "1", "MASTER_ADDR": "a"})
        .keys()
        .isdisjoint({"MASTER_PORT", "MASTER_ADDR"})
    )
    assert worker_of_srun(task | {"SLURM_NODEID": "3"})["LOCAL_WORLD_SIZE"] == "1"
    assert worker_of_srun(task | {"CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        STEP | {"SLURM_PROCID": "0", "RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},
    ],
    ids=["no slurm", "one task", "torchrun's worker", "batch script"],
)
def test_what_is_no_task_among_several_of_srun_stays_as_it_is(environment):
    assert worker_of_srun(environment) == {}


@pytest.mark.parametrize(
    ("processes", "profile", "joined"),
    [
        (None, None, {"RANK": "1"}),
        (None, "ddp", {"RANK": "1"}),
        (None, "fsdp2", {"RANK": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        (None, "fsdp2-multinode", {}),
        (2, "fsdp2", {}),
    ],
)
def test_a_task_of_srun_is_a_worker_unless_it_is_to_start_some(processes, profile, joined, monkeypatch):
    environment = STEP | {"SLURM_PROCID": "1"}
    monkeypatch.setattr(os, "environ", environment)

    launch.join_others(processes, profile)

    added = {name: environment[name] for name in ("RANK", "ACCELERATE_USE_FSDP", "FSDP_VERSION") if name in environment}
    assert added == joined


def test_two_tasks_of_srun_are_one_run(recipe, tmp_path):
    file = recipe({"training.max_steps": 2})
    step = STEP | {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [start_process("train", file, **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]

    said = [task.communicate(timeout=240) for task in tasks]

    assert [task.returncode for task in tasks] == [0, 0], said
    assert [event["processes"] for event in events(tmp_path / "out", "started")] == [2]
    assert len(events(tmp_path / "out", "step")) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_launcher_is_an_interruption(number, code, lora, recipe, launched):
    launched(SignalException("got it", number))

    done = lora("train", recipe(), "--processes", 2, code=code)

    assert done.err == ""


def test_machines_that_do_not_meet_are_exit_8(lora, recipe, launched):
    launched(RendezvousConnectionError("The connection has failed.\nmore"))

    done = lora("train", recipe(), "--processes", 2, code=8)

    assert done.err.startswith("error: the machines did not meet: The connection has failed.\n  --> localhost:0\n")


@pytest.mark.parametrize(
    ("ended", "code", "text"),
    [
        ({0: (-15, 5), 1: (-9, 5)}, 8, "worker 1 was killed by signal 9 (SIGKILL)"),
        ({0: (8, 4), 1: (-9, 5)}, 8, "worker 1 was killed by signal 9 (SIGKILL)"),
        ({0: (-15, 5), 1: (-15, 5)}, 8, "worker 0 was killed by signal 15 (SIGTERM)"),
        ({0: (-15, 5), 1: (4, 5)}, 4, "said by 1"),
        ({0: (-9, 35), 1: (6, 5)}, 6, "said by 1"),
        ({0: (8, 5), 1: (4, 6)}, 4, "said by 1"),
    ],
    ids=["killed", "killed and lost", "terminated", "failed", "failed, and a survivor that hangs", "failed and lost"],
)
def test_the_worker_that_failed_first_speaks_for_all(ended, code, text, tmp_path, capsys):
    for rank in (0, 1):
        (tmp_path / str(rank)).write_text(f"said by {rank}")
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=at) for rank, (code, at) in ended.items()}

    error = launch._worker_failed(failures, tmp_path)

    assert error.code == code
    said = f"{error}\n{capsys.readouterr().err}"
    assert text in said
    assert ("said by" in said) == isinstance(error, SystemExit)


def test_where_the_first_can_not_write_it_speaks_for_all(tmp_path, capsys):
    for rank, said in enumerate(["error: the disk refuses", "error: worker 0 failed to write"]):
        (tmp_path / str(rank)).write_text(said)
    failures = {0: SimpleNamespace(exitcode=5, timestamp=6), 1: SimpleNamespace(exitcode=5, timestamp=5)}

    assert launch._worker_failed(failures, tmp_path).code == 5
    assert capsys.readouterr().err == "error: the disk refuses\n"


def test_an_error_of_every_worker_is_shown_once_with_its_code(recipe):
    done = lora_process("train", recipe({"lora.targets": ["q_prj"]}), "--processes", 2, code=4)

    assert done.err.count("error:") == 1
    assert "`q_prj` in `lora.targets` matches no weight of this model that can get an adapter" in done.err
    assert "Traceback" not in done.err


def test_a_worker_that_is_killed_ends_the_run_with_exit_8(recipe, tmp_path):
    process = start_process("train", recipe({"training.max_steps": 100_000}), "--processes", 2)
    workers = workers_in_training(process, tmp_path / "out")

    workers[1].kill()
    _, err = process.communicate(timeout=120)

    assert process.returncode == 8, err
    assert err.count("error:") == 1
    assert "worker 1 was killed by signal 9 (SIGKILL)" in err
    assert "torch/distributed" not in err
    assert_gone(workers)


def test_a_launcher_that_is_killed_leaves_no_worker_behind(recipe, tmp_path):
    process = start_process("train", recipe({"training.max_steps": 100_000}), "--processes", 2)
    workers = workers_in_training(process, tmp_path / "out")

    process.kill()

    process.communicate(timeout=120)  # their ends of the pipes are closed
    psutil.wait_procs(workers.values(), timeout=60)
    assert_gone(workers)


def failing_worker(folder: Path, act: str) -> str:
    """A PYTHONPATH with which worker 1 does `act` as it makes its optimizer."""
    (folder / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import lora_cli.runs.train as train\n"
        "    from lora_cli.errors import ModelError, Problem\n"
        "    import signal, time\n"
        f"    def act(*_): {act}\n"
        "    train.make_optimizer = act\n"
    )
    return os.pathsep.join([str(folder), str(ROOT)])


@pytest.mark.parametrize(
    ("act", "code", "said"),
    [
        ("raise ModelError(Problem('only here'))", 4, "error: only here\n"),
        ("raise ZeroDivisionError('only here')", 1, "error: a bug in lora: ZeroDivisionError: only here\n"),
    ],
    ids=["a user's error", "a bug"],
)
def test_the_error_of_one_worker_is_shown_once_with_its_code(act, code, said, recipe, tmp_path):
    path = failing_worker(tmp_path, act)

    process = start_process("train", recipe(), "--processes", 2, PYTHONPATH=path)
    _, err = process.communicate(timeout=240)

    assert process.returncode == code, err
    assert said in err
    assert err.count("error:") == 1


def test_a_worker_that_is_stopped_ends_the_run_with_one_error(recipe, tmp_path):
    process = start_process(
        "train", recipe({"training.max_steps": 100_000}), "--processes", 2, "--on", "fsdp2", LORA_HANG_SECONDS="5"
    )
    workers = workers_in_training(process, tmp_path / "out")

    workers[1].suspend()
    _, err = process.communicate(timeout=240)

    assert process.returncode == 8, err
    assert err.count("error:") == 1
    assert "error: worker 1 hangs: nothing has happened for " in err
    assert "worker 0: " in err
    assert_gone(workers)


def test_workers_that_can_not_go_on_for_want_of_memory_are_started_again(recipe, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1' and 'LORA_SHORTAGE' not in os.environ:\n"
        "    from faults import at_call\n"
        "    from lora_cli.objectives.table import OBJECTIVES\n"
        "    def fail(): raise MemoryError\n"
        "    OBJECTIVES['sft'] = at_call(3, OBJECTIVES['sft'], fail)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")])
    settings = {"data.packing": False, "training.micro_batch_size": 2, "training.save_steps": 2}

    process = start_process("train", recipe(settings), "--processes", 2, "--on", "fsdp2", PYTHONPATH=path)
    _, err = process.communicate(timeout=280)

    assert process.returncode == 0, err
    assert "warning: out of memory on worker 1 in step 3, while the others wait for it: all workers start again" in err
    assert "error:" not in err
    assert [event["step"] for event in events(tmp_path / "out", "started")] == [0, 2]
    assert [event["step"] for event in events(tmp_path / "out", "step")] == [1, 2, 3, 4]
    assert [event["micro_batch_size"] for event in events(tmp_path / "out", "out_of_memory")] == [1]


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--resume",)])
def test_started_again_the_command_continues_its_run(options, monkeypatch, capsys):
    started, said = [], '{"step": 3, "rank": 1, "micro_batch_size": 1, "row_length": 64}'
    monkeypatch.setattr("os.execv", lambda program, arguments: started.extend(arguments[1:]))
    monkeypatch.setattr("sys.argv", ["lora", "train", "r.yaml", *options, "--processes", "2"])
    monkeypatch.setenv(launch.SHORTAGE, "")

    launch._start_again(said)

    assert started == ["-m", "lora_cli", "train", "r.yaml", "--processes", "2", "--resume"]
    assert launch.shortage_before() == OutOfMemory(3, 1, 1, 64)


@pytest.mark.parametrize("kind", ["MULTI_GPU", "FSDP"])
def test_two_machines_are_one_run(kind, recipe, tmp_path):
    """Two launchers with a worker each, which meet on this machine."""
    shards = "fsdp_config: {fsdp_version: 2}\n" if kind == "FSDP" else ""
    meeting = f"main_process_ip: localhost\nmain_process_port: {free_port()}\n"
    profile = profile_of(tmp_path, f"distributed_type: {kind}\n{shards}num_machines: 2\nnum_processes: 2\n{meeting}")
    file = recipe({"training.max_steps": 2})

    machines = [start_process("train", file, "--on", profile) for _ in range(2)]
    said = [machine.communicate(timeout=280) for machine in machines]

    assert [machine.returncode for machine in machines] == [0, 0], said
    assert [event["processes"] for event in events(tmp_path / "out", "started")] == [2]
    assert len(events(tmp_path / "out", "step")) == 2


def test_a_launcher_that_is_interrupted_takes_its_workers_along(recipe, tmp_path):
    process = start_process("train", recipe({"training.max_steps": 100_000}), "--processes", 2)
    workers = workers_in_training(process, tmp_path / "out")

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)

    assert process.returncode == 130, err
    assert "error:" not in err
    assert "Traceback" not in err
    assert "torch/distributed" not in err
    assert_gone(workers)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
        torch.distributed.DistNetworkError("The client socket has timed out"),
    ],
    ids=["gloo", "nccl", "store"],
)
def test_a_worker_that_lost_the_others_is_exit_8(error, lora, recipe, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("lora_cli.runs.train.prepare", fail)
    monkeypatch.setenv("RANK", "0")

    done = lora("train", recipe(), code=8)

    assert done.err.startswith("error: worker 0 lost the others: ")


def test_what_our_workers_have_to_say_is_left_to_the_launcher(lora, recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(ERRORS, str(tmp_path))
    monkeypatch.setattr("lora_cli.cli.main.end_with_launcher", lambda: None)

    done = lora("train", recipe({"model.base": "./nowhere"}), code=4)

    assert "error:" not in done.err
    assert (tmp_path / "1").read_text().startswith("error: ")


def test_more_processes_than_gpus_are_refused(lora, recipe, launched):
    started = launched(gpus=1)

    done = lora("train", recipe(), "--processes", 2, code=2)

    assert done.err.startswith(
        "error: 2 processes need as many GPUs, and this machine has 1\n  fix: use `--processes 1`"
    )
    assert not started


def test_workers_get_every_option_but_those_of_the_launch(lora, recipe, launched):
    started = launched()
    file = recipe()

    lora("train", file, "--processes=2", "--on", "ddp", "--debug", "--set", "lora.r=2")

    assert started == ["-m", "lora_cli", "train", str(file), "--debug", "--set", "lora.r=2"]


def test_profiles_are_found_anywhere_and_the_users_own_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_profile("ddp") == Profile()

    own = tmp_path / "configs" / "launch" / "ddp.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("num_processes: 3\n")

    assert read_profile("ddp") == Profile(num_processes=3)


@pytest.mark.parametrize(
    ("package", "share"),
    [("lib/python3.11/site-packages/lora_cli", "share/lora/launch"), ("target/lora_cli", "target/share/lora/launch")],
    ids=["pip install", "pip install --target"],
)
def test_profiles_of_an_installation_are_among_those_looked_at(package, share, tmp_path, monkeypatch):
    assert tmp_path / share in profile_folders(tmp_path / package)

    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    assert data == {str(profiles.SHARE): [f"{profiles.FOLDER}/*.yaml"]}


SHARDS = "distributed_type: FSDP\nfsdp_config:\n"


def profile_of(tmp_path: Path, text: str) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return str(file)


def test_what_accelerate_config_writes_is_taken(tmp_path):
    written = (
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: MULTI_GPU\ndowncast_bf16: 'no'\n"
        "enable_cpu_affinity: false\ngpu_ids: all\nmachine_rank: 0\nmain_training_function: main\nmixed_precision: 'no'\n"
        "num_machines: 1\nnum_processes: 4\nrdzv_backend: static\nsame_network: true\ntpu_env: []\n"
        "tpu_use_cluster: false\ntpu_use_sudo: false\nuse_cpu: false\n"
    )

    assert read_profile(profile_of(tmp_path, written)) == Profile(num_processes=4)


def test_what_accelerate_config_writes_for_fsdp_is_taken(tmp_path):
    written = (
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: FSDP\ndowncast_bf16: 'no'\nfsdp_config:\n"
        "  fsdp_activation_checkpointing: false\n  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
        "  fsdp_cpu_ram_efficient_loading: true\n  fsdp_offload_params: false\n  fsdp_reshard_after_forward: true\n"
        "  fsdp_state_dict_type: SHARDED_STATE_DICT\n  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer\n"
        "  fsdp_version: 2\nmixed_precision: 'no'\nnum_machines: 1\nnum_processes: 4\nparallelism_config: {}\n"
    )

    assert read_profile(profile_of(tmp_path, written)) == Profile(
        num_processes=4, sharding=Sharding(("LlamaDecoderLayer",))
    )


def test_processes_are_counted_over_all_machines(tmp_path):
    meeting = "main_process_ip: 10.0.0.1\nmain_process_port: 29500\n"

    assert read_profile(profile_of(tmp_path, f"num_machines: 2\nnum_processes: 16\n{meeting}")) == Profile(
        8, 2, "10.0.0.1", 29500
    )
    with pytest.raises(
        RecipeError, match=r"15 processes are not the same number on each of 2 machines\n.*mine.yaml:2:1"
    ):
        read_profile(profile_of(tmp_path, f"num_machines: 2\nnum_processes: 15\n{meeting}"))
    with pytest.raises(RecipeError, match=r"2 machines need a place to meet\n.*mine.yaml:1:1"):
        read_profile(profile_of(tmp_path, "num_machines: 2\nnum_processes: 16\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "a launch profile is a block"),
        ("num_processes: auto\n", "`num_processes: auto` is not a number"),
        ("num_processes: 0\n", "`num_processes: 0` is not a number"),
        ("num_processes: [2]\n", "`num_processes: …` is not a number"),
        ("num_processes: 2\nnum_processes: 3\n", "`num_processes` is given twice"),
        ("main_process_port: 70000\n", "`main_process_port: 70000` is not a number"),
        ("main_process_ip: {a: 1}\n", "`main_process_ip` is not a name"),
        ("mixed_precision: bf16\n", "`mixed_precision: bf16` of the launch profile has no effect here"),
        ("use_cpu: true\n", "`use_cpu: true` of"),
        ("gpu_ids: 0,1\n", "`gpu_ids: 0,1` of"),
        ("machine_rank: 1\n", "`machine_rank: 1` of"),
        ("distributed_type: DEEPSPEED\n", "`distributed_type: DEEPSPEED` of"),
        ("distributed_type: FSDP\n", "`distributed_type: FSDP` needs `fsdp_config`"),
        ("fsdp_config: {fsdp_version: 2}\n", "`fsdp_config` has no effect without `distributed_type: FSDP`"),
        (f"{SHARDS}  fsdp_version: 1\n", "`fsdp_version: 1` is not supported"),
        (f"{SHARDS}  fsdp_version: 2\n  fsdp_offload_params: true\n", "`fsdp_offload_params: true` is not supported"),
        (
            f"{SHARDS}  fsdp_version: 2\n  fsdp_min_num_params: 9\n",
            "`fsdp_min_num_params` of `fsdp_config` is not known",
        ),
        (f"{SHARDS}  fsdp_auto_wrap_policy: NO_WRAP\n", "`distributed_type: FSDP` needs `fsdp_config`"),
    ],
)
def test_a_profile_that_would_not_be_followed_is_refused_with_its_place(text, said, tmp_path):
    with pytest.raises(RecipeError) as raised:
        read_profile(profile_of(tmp_path, text))

    assert said in str(raised.value)
    assert str(tmp_path / "mine.yaml") in str(raised.value)


def test_all_that_is_wrong_with_a_profile_is_said_at_once(tmp_path):
    with pytest.raises(RecipeError) as raised:
        read_profile(profile_of(tmp_path, "use_cpu: true\nnum_processes: auto\n"))

    assert [problem.where.rpartition("yaml:")[2] for problem in raised.value.problems] == ["1:1", "2:1"]


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"# " + b"x" * 1_000_000, SafetyError), (b"\xff\xfe\x00", RecipeError)],
    ids=["large", "not text"],
)
def test_a_file_that_is_no_profile_is_refused(content, error, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)

    with pytest.raises(error, match="launch profile"):
        read_profile(str(tmp_path / "mine.yaml"))


def test_a_profile_with_a_tag_is_refused_for_safety(tmp_path):
    with pytest.raises(SafetyError):
        read_profile(profile_of(tmp_path, "num_processes: !!python/object:os.system 2\n"))


def test_an_unknown_profile_is_exit_2_and_names_those_there_are(lora, recipe):
    done = lora("train", recipe(), "--on", "slrum", code=2)

    assert "no launch profile `slrum`" in done.err
    assert "profiles here: ddp, fsdp2, fsdp2-multinode, multinode, single" in done.err


def test_the_version_needs_no_command(lora):
    assert lora("--version").out.startswith("lora ")


def test_the_allocators_plain_errors_are_out_of_memory(lora, recipe, monkeypatch):
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(2**60)
    assert type(allocation.value) is RuntimeError

    def fail(*_, **__):
        raise allocation.value

    monkeypatch.setattr("lora_cli.runs.train.prepare", fail)

    assert "out of memory: " in lora("train", recipe(), code=7).err
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_a_base_that_does_not_fit_in_memory_is_no_broken_base(lora, recipe, monkeypatch):
    from transformers import AutoModelForCausalLM

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)

    lora("train", recipe(), code=7)
