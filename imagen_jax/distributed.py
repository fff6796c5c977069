"""Many processes as one program: found by themselves on a cluster, or told of each other.

Call `start` before anything touches a device. Every process then runs the same commands in the same
order on its own rows; process 0 alone talks and writes what is not an array.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from imagen_jax.errors import UserError


def start(
    coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None
) -> None:
    """Joins the other processes, if there are any; on a single machine it does nothing.

    `coordinator` is the address of process 0, as `host:port`. Without it a cluster is looked for: a
    TPU slice, Slurm, an indexed job of Kubernetes, Open MPI; `num_processes` 1 alone says that this
    one joins nobody. Raises ValueError if only some of the three are given, or the others cannot be
    reached.
    """
    if num_processes == 1:
        return
    told = (coordinator, process_id, num_processes)
    if any(x is None for x in told) != all(x is None for x in told):
        raise UserError("--coordinator, --process-id and --num-processes go together.")
    if coordinator is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process-id {process_id} is none of 0 .. {num_processes - 1}.")
    if coordinator is None and not in_cluster(os.environ):
        return
    if coordinator is None and _in_kubernetes(os.environ) and not _installed("kubernetes"):
        raise UserError(
            "to find the other pods of a Kubernetes job: pip install -e '.[k8s]'. Or give "
            "--coordinator, --process-id and --num-processes; --num-processes 1 to stay alone."
        )
    # It would take SIGTERM for itself; train/interrupt.py hears it, and agrees with the others.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=local_devices(os.environ),
            cluster_detection_method=None if coordinator is None else "deactivate",
        )
    except RuntimeError as error:
        raise UserError(f"the processes did not find each other: {error}") from error
    if not talks():
        # The file itself: libraries below Python talk too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def talks() -> bool:
    """Whether this is the one process that prints, and writes what is not an array."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """What every process says, in their order. All of them must ask."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(own.size))
    padded = np.zeros(max(lengths.max(), 1), np.uint8)
    padded[: own.size] = own
    every = multihost_utils.process_allgather(padded)
    return [bytes(row[:n]).decode() for row, n in zip(every, lengths, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What goes wrong inside in one process goes wrong in all: none is left to wait for it.

    Nothing inside may wait for the others. Raises what was raised, and ValueError elsewhere.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as raised:
        error = raised
    said = gather("" if error is None else str(error))
    if error is not None:
        raise error
    for number, text in enumerate(said):
        if text:
            raise UserError(f"process {number}: {text}")


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several, or of a TPU slice, by what its launcher has set."""
    slurm, mpi = (
        int(environment.get(name, 1)) > 1
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    return slurm or mpi or _in_kubernetes(environment) or _on_tpu(environment)


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the visible GPUs are this process's, where several of Slurm or Open MPI share a
    machine; None leaves it to JAX.

    JAX takes the one with the number of the task on its machine. That is wrong where the launcher
    shows every task its own GPU alone, as number 0, and where one task has all of them.
    """
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE")
    tasks = tasks or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if tasks is None or not visible:
        return None
    count = len(visible.split(","))
    alone = tasks.partition("(")[0] == "1"
    return list(range(count)) if alone or count == 1 else None


def _in_kubernetes(environment: Mapping[str, str]) -> bool:
    return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _on_tpu(environment: Mapping[str, str]) -> bool:
    """A machine with TPU chips may be one of a slice: only its metadata server knows, which JAX
    asks. Alone, it joins nobody."""
    if environment.get("JAX_PLATFORMS", "") not in ("", "tpu"):
        return False
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and _installed("libtpu")
