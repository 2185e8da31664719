"""srun starts the workers itself: its variables, under the names that torch reads."""

import os
import re
from collections.abc import Mapping

STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
LOWEST_PORT, PORTS = 15_000, 15_000  # below the ports that Linux gives out by itself


def join_srun() -> None:
    """Make a task of `srun --ntasks N` the worker that it is; nothing where RANK says that another launcher was here."""
    os.environ.update(worker_of_srun(os.environ))


def worker_of_srun(slurm: Mapping[str, str]) -> dict[str, str]:
    """What is missing of torch's variables. Empty outside a step of several tasks: a batch script is one process."""
    tasks = slurm.get("SLURM_STEP_NUM_TASKS", slurm.get("SLURM_NTASKS", "1"))
    if "RANK" in slurm or "SLURM_PROCID" not in slurm or int(tasks) == 1 or not any(key in slurm for key in STEP):
        return {}
    nodes = slurm.get("SLURM_STEP_NODELIST") or slurm.get("SLURM_JOB_NODELIST", "")
    missing = {
        "LOCAL_WORLD_SIZE": _tasks_here(slurm, tasks),
        "MASTER_ADDR": first_host(nodes) or slurm.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"),
        "MASTER_PORT": str(LOWEST_PORT + int(slurm.get("SLURM_JOB_ID", 0)) % PORTS),
    }
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": _local_rank(slurm),
        "WORLD_SIZE": tasks,
    } | {key: value for key, value in missing.items() if key not in slurm}


def first_host(nodes: str) -> str:
    """`node[01-03,07],gpu1` -> `node01`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _local_rank(slurm: Mapping[str, str]) -> str:
    """With `--gpus-per-task=1` each task sees one GPU, and it is number 0."""
    gpus = slurm.get("CUDA_VISIBLE_DEVICES", "")
    return "0" if gpus and "," not in gpus else slurm.get("SLURM_LOCALID", "0")


def _tasks_here(slurm: Mapping[str, str], tasks: str) -> str:
    """`2(x3),1` tasks a node, of the node that this is."""
    text = slurm.get("SLURM_STEP_TASKS_PER_NODE") or slurm.get("SLURM_TASKS_PER_NODE") or tasks
    counts = [count for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    return counts[min(int(slurm.get("SLURM_NODEID", 0)), len(counts) - 1)]
