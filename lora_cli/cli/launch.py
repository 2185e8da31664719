"""One process or many: `--processes N` and `--on PROFILE` start this command again as N workers.

Under torchrun, `accelerate launch` or srun the process finds RANK set and is one of their workers.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lora_cli.cli.worker import AGAIN, ERRORS, HANG, LAUNCHER, is_worker
from lora_cli.errors import FIRST_FAILED, DistributedError, Problem, RecipeError, first_line
from lora_cli.runs.lock import COMMAND, command
from lora_cli.signals import GRACE_SECONDS, NUMBERS, exit_code

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from lora_cli.cli.profiles import Profile
    from lora_cli.train.events import OutOfMemory

# How long torch's launcher waits for its workers after it has handed a signal on: somewhat longer than they take
KILL_AFTER, MARGIN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 5
LAUNCH_OPTIONS = ("--processes", "--on")
SHORTAGE = "LORA_SHORTAGE"  # of memory: why the workers before these have left


def join_others(processes: int | None, profile: str | None) -> None:
    """Make a task of srun the worker that it is, and let a worker of any launcher shard as the profile says.

    With `--processes`, or a profile of several machines, each task starts workers of its own.
    """
    from lora_cli.cli.profiles import Profile, read_profile
    from lora_cli.cli.slurm import join_srun

    settings = read_profile(profile) if profile else Profile()
    if processes is None and settings.num_machines == 1:
        join_srun()
    if is_worker() and settings.sharding:
        os.environ.update(settings.sharding.environment())


def run_as_workers(processes: int | None, profile: str | None, grace_seconds: float = GRACE_SECONDS) -> bool:
    """Run this command as several workers and wait for them; False where one process is enough."""
    from lora_cli.cli.profiles import Profile, read_profile

    settings = read_profile(profile) if profile else Profile()
    here = processes or settings.num_processes or _visible_gpus() or 1
    if here == 1 and settings.num_machines == 1 and not settings.sharding:
        return False
    _launch(here, settings, grace_seconds)
    return True


def _launch(processes: int, settings: "Profile", grace_seconds: float) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _check_gpus(processes)
    os.environ[KILL_AFTER] = str(round(grace_seconds) + MARGIN)
    config = LaunchConfig(
        min_nodes=settings.num_machines,
        max_nodes=settings.num_machines,
        nproc_per_node=processes,
        run_id="lora",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{settings.main_process_ip}:{settings.main_process_port}",
        max_restarts=0,
        signals_to_handle=",".join(signal.Signals(number).name for number in NUMBERS),
    )
    os.environ[COMMAND] = command()
    os.environ[LAUNCHER] = str(os.getpid())
    if settings.sharding:
        os.environ.update(settings.sharding.environment())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    _quiet_launcher()
    with tempfile.TemporaryDirectory(prefix="lora-", ignore_cleanup_errors=True) as errors:
        os.environ[ERRORS] = errors
        try:
            elastic_launch(config, sys.executable)("-m", "lora_cli", *_without_launch_options(sys.argv[1:]))
        except ChildFailedError as error:
            again = _text(Path(errors) / AGAIN)
            if not again:
                raise _worker_failed(error.failures, Path(errors)) from error
        except SignalException as error:
            raise SystemExit(exit_code(error.sigval)) from error
        except RendezvousError as error:
            raise _not_met(error, config.rdzv_endpoint) from error
        else:
            return
    _start_again(again)


def shortage_before() -> "OutOfMemory | None":
    """Why these workers were started again, in smaller forwards; None where they were not."""
    from lora_cli.train.memory import StartAgain

    said = os.environ.get(SHORTAGE)
    return StartAgain.from_json(said).shortage if said else None


def _start_again(said: str) -> NoReturn:
    """This command anew, with `--resume`: nothing of the workers that have left stays, and no port is taken.

    Every time with smaller forwards than before, so this ends: where a single row does not fit, workers fail with exit 7.
    """
    from lora_cli.cli.console import note
    from lora_cli.train.memory import StartAgain

    shortage = StartAgain.from_json(said).shortage
    note(
        f"warning: out of memory on worker {shortage.rank} in step {shortage.step}, while the others wait for it: "
        "all workers start again from the last saved step, in smaller forwards",
        style="yellow",
    )
    os.environ[SHORTAGE] = said
    kept = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "lora_cli", *kept, "--resume"])


def _check_gpus(processes: int) -> None:
    gpus = _visible_gpus()
    if 0 < gpus < processes:
        raise RecipeError(
            Problem(
                f"{processes} processes need as many GPUs, and this machine has {gpus}",
                fix=f'use `--processes {gpus}`; CUDA_VISIBLE_DEVICES="" hides the GPUs, to train on the CPU',
            )
        )


def _worker_failed(failures: "Mapping[int, ProcessFailure]", errors: Path) -> SystemExit | DistributedError:
    """The exit code of the worker that failed first, whose error is shown; a killed one could not write one."""
    if (errors / HANG).is_file():  # those that waited for it have ended it
        return _said(errors / HANG, DistributedError.code)
    rank, failure = _cause(failures, errors)
    if failure.exitcode < 0:
        died_of = -failure.exitcode
        return DistributedError(
            Problem(
                f"worker {rank} was killed by signal {died_of} ({signal.Signals(died_of).name})",
                fix="look for out-of-memory kills; continue with `--resume`",
            )
        )
    return _said(errors / str(rank), failure.exitcode)


def _said(file: Path, code: int) -> SystemExit:
    if text := _text(file):
        from lora_cli.cli.console import note

        note(text)
    return SystemExit(code)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


SOON = 10  # seconds; the launcher waits longer than that before it kills


def _cause(failures: "Mapping[int, ProcessFailure]", errors: Path) -> "tuple[int, ProcessFailure]":
    """Who was killed, else who failed by itself, else who lost the others. Those left over the launcher stops, by SIGTERM."""
    first = min(failure.timestamp for failure in failures.values())

    def order(item: "tuple[int, ProcessFailure]") -> tuple:
        rank, failure = item
        code = failure.exitcode
        killed = code < 0 and code != -signal.SIGTERM and failure.timestamp < first + SOON
        followed = code == DistributedError.code or FIRST_FAILED in _text(errors / str(rank))
        return not killed, code < 0, followed, failure.timestamp, rank

    return min(failures.items(), key=order)


def _not_met(error: Exception, endpoint: str) -> DistributedError:
    return DistributedError(
        Problem(
            f"the machines did not meet: {first_line(error)}",
            where=endpoint,
            fix="start the same command on every machine; `main_process_ip` and `main_process_port` must be reachable from all",
        )
    )


def _quiet_launcher() -> None:
    """Workers say what went wrong. Every logger of torch's launcher sets a level of its own, so it is stopped above them."""
    import logging

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logger = logging.getLogger(name)
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False


def _without_launch_options(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in LAUNCH_OPTIONS:
            skip = True
        elif not argument.startswith(tuple(f"{option}=" for option in LAUNCH_OPTIONS)):
            kept.append(argument)
    return kept


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()
