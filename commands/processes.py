"""Joins the other processes of a run, and ends together with them.

`start` finds them by the cluster's environment or by an address. A process that fails reports it in
the key-value store of JAX's coordinator, where a thread in each of the others reads it.
"""

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import jax
from jax._src.distributed import global_state  # its key-value store has no public name

from imagen_jax import distributed
from imagen_jax.errors import UserError

_FAILED = "imagen_jax/failed"  # key of the first failure
_GRACE = 1.0  # seconds
_ending = threading.Event()  # this process is printing its own error
_HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead


def start(
    coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None
) -> None:
    """Joins the other processes, if there are any; on a single machine it does nothing.

    Call it before anything touches a device. `coordinator` is the address of process 0, as
    `host:port`. Without it a cluster's environment is detected: a TPU slice, Slurm, an indexed job
    of Kubernetes, Open MPI; `num_processes` 1 on its own joins none. Raises UserError if only some
    of the three are given, or the others cannot be reached.
    """
    if num_processes == 1:
        return
    given = (coordinator, process_id, num_processes)
    if any(x is None for x in given) != all(x is None for x in given):
        raise UserError("--coordinator, --process-id and --num-processes must be given together.")
    if coordinator is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process-id {process_id} is not in 0 .. {num_processes - 1}.")
    if coordinator is None and not in_cluster(os.environ):
        return
    if coordinator is None and _in_kubernetes(os.environ) and not _installed("kubernetes"):
        raise UserError(
            "finding the other pods of a Kubernetes job needs: pip install -e '.[k8s]'. Or give "
            "--coordinator, --process-id and --num-processes; --num-processes 1 runs on its own."
        )
    # It would take SIGTERM for itself; train/interrupt.py handles it, and agrees with the others.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=local_devices(os.environ),
            cluster_detection_method=None if coordinator is None else "deactivate",
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except RuntimeError as error:
        raise UserError(f"the processes did not find each other: {error}") from error
    threading.Thread(target=_end_with_others, daemon=True).start()
    if not distributed.talks():
        # The file descriptor: native libraries print too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def started() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def own_number() -> int:
    """Number of this process among those it has joined, without asking for devices."""
    return global_state.process_id if started() else 0


def end_all(message: str) -> NoReturn:
    """Ends this failed process, and the others within seconds: they may be waiting for it in a
    collective, and would wait until its heartbeat is missed."""
    _ending.set()
    message = json.dumps([own_number(), message])
    global_state.client.key_value_set(_FAILED, message, allow_overwrite=True)
    if own_number() == 0:  # it has the store that the others read
        time.sleep(2 * _GRACE)
    sys.stdout.flush()
    os._exit(1)  # `exit` would wait for the others


def _end_with_others() -> None:
    """Waits for another process to fail, then ends this one; runs in a thread."""
    while started():
        time.sleep(_GRACE / 4)
        try:
            found = global_state.client.key_value_try_get(_FAILED)
        except (jax.errors.JaxRuntimeError, AttributeError):  # none failed; or this one is closing
            continue
        number, message = json.loads(found)
        if _ending.wait(_GRACE):  # this process got the same error, and prints it better
            return
        print(f"error: process {number}: {message}", file=sys.stderr, flush=True)
        os._exit(1)


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether its launcher's environment makes this process one of several, or of a TPU slice."""
    slurm, mpi = (
        int(environment.get(name, 1)) > 1
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    return slurm or mpi or _in_kubernetes(environment) or _on_tpu(environment)


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the visible GPUs are this process's, if several processes of Slurm or Open MPI share
    a machine; None leaves it to JAX.

    JAX takes the GPU with the task's number on its machine. That is wrong if the launcher shows
    every task only its own GPU, as number 0, and if one task has all of them.
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
    """A machine with TPU chips may be part of a slice: only its metadata server knows, which JAX
    asks. A single machine joins no others."""
    if environment.get("JAX_PLATFORMS", "") not in ("", "tpu"):
        return False
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and _installed("libtpu")
