"""One process or many: `--processes N` and `--on PROFILE` start this command again as N workers.

Under torchrun, `accelerate launch` or srun the process finds RANK set and is one of their workers.
"""

import os
import sys
from pathlib import Path

from lora_cli.errors import DistributedError, Problem, RecipeError

PROFILES = Path("configs/launch")
LAUNCH_OPTIONS = ("--processes", "--on")


def is_worker() -> bool:
    return "RANK" in os.environ


def is_first_worker() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def run_as_workers(processes: int | None, profile: str | None) -> bool:
    """Run this command as several workers and wait for them; False where one process is enough."""
    settings = _read_profile(profile) if profile else {}
    here = processes or settings.get("num_processes") or _visible_gpus() or 1
    machines = settings.get("num_machines", 1)
    if here == 1 and machines == 1:
        return False
    _launch(here, settings)
    return True


def _launch(processes: int, settings: dict) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    machines = settings.get("num_machines", 1)
    address = f"{settings.get('main_process_ip', 'localhost')}:{settings.get('main_process_port', 0)}"
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes,
        run_id="lora",
        rdzv_backend="c10d",
        rdzv_endpoint=address,
        max_restarts=0,
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    _quiet_launcher()
    try:
        elastic_launch(config, sys.executable)("-m", "lora_cli", *_without_launch_options(sys.argv[1:]))
    except ChildFailedError as error:
        raise _worker_failed(error) from error


def _worker_failed(error) -> SystemExit | DistributedError:
    """The first failed worker's own exit code: it has said why; a killed one could not."""
    rank, failure = error.get_first_failure()
    if failure.exitcode > 0:
        return SystemExit(failure.exitcode)
    return DistributedError(
        Problem(
            f"worker {rank} was killed by signal {-failure.exitcode}",
            fix="look for out-of-memory kills; continue with `--resume`",
        )
    )


def _quiet_launcher() -> None:
    import logging

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)


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


KNOWN = {"num_processes": int, "num_machines": int, "main_process_ip": str, "main_process_port": int}
IGNORED = {
    "compute_environment",
    "machine_rank",
    "distributed_type",
    "mixed_precision",
    "use_cpu",
    "debug",
    "main_training_function",
    "rdzv_backend",
    "same_network",
    "downcast_bf16",
    "gpu_ids",
}
PLAIN = {"NO", "MULTI_GPU", "MULTI_CPU"}


def _read_profile(profile: str) -> dict:
    """An Accelerate config file; its number of processes is over all machines, ours is per machine."""
    import yaml

    file = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in PROFILES.glob("*.yaml"))) or "none"
        raise RecipeError(
            Problem(f"no launch profile {profile!r}", where=str(file), fix=f"profiles here: {there}; or give a file")
        )
    found = yaml.safe_load(file.read_text()) or {}
    if unknown := sorted(set(found) - set(KNOWN) - IGNORED):
        raise RecipeError(
            Problem(
                f"the launch profile has keys that are not known here: {', '.join(unknown)}",
                where=str(file),
                fix=f"keep {', '.join(KNOWN)}",
            )
        )
    if found.get("distributed_type", "NO") not in PLAIN:
        raise RecipeError(
            Problem(
                f"`distributed_type: {found['distributed_type']}` is not supported yet",
                where=str(file),
                fix="use MULTI_GPU (data parallel) or NO",
            )
        )
    settings = {key: kind(found[key]) for key, kind in KNOWN.items() if found.get(key) is not None}
    if "num_processes" in settings:
        settings["num_processes"] = max(1, settings["num_processes"] // settings.get("num_machines", 1))
    return settings
