"""Two and four processes, each with some of the devices, are one: same rows, same noise, and after
a save and a resume by another number of processes the same parameters."""

import dataclasses
import os
import re
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax
import numpy as np
import pytest

from imagen_jax import checkpoint, distributed
from imagen_jax.sharding import make_layout
from tests.train import forked, support
from tests.train.process import train, watched
from train import loop

DEVICES = 4


def start(folder: Path, settings, processes: int) -> tuple[list[BaseProcess], list[Path]]:
    """Starts the settings by so many processes; each says and notes what it does in a file."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    files = [folder / f"{processes}-{number}" for number in range(processes)]
    running = []
    for number, file in enumerate(files):
        told = dict(coordinator=f"localhost:{port}", process_id=number, num_processes=processes)
        own = dataclasses.replace(settings, **told)
        running.append(forked.start(train, own, file, said=file, environment={"XLA_FLAGS": flags}))
    return running, files


def finish(running: list[BaseProcess], files: list[Path]) -> tuple[list[dict], list[str]]:
    """What each process has seen, and said."""
    for process in running:
        process.join(240)
    said = [file.read_text() for file in files]
    assert not any(process.exitcode for process in running), said
    return [dict(np.load(f"{file}.npz")) for file in files], said


@pytest.mark.parametrize("mesh", ["4x1", pytest.param("2x2", marks=pytest.mark.long)])
def test_processes_are_one(tmp_path, monkeypatch, mesh):
    """Two, of which one is told to stop; then four; then one alone, for comparison."""
    same = dict(mesh=mesh, eps=1e-3, flip=True, save_every=1000)
    settings = support.settings(tmp_path, steps=1000, **same)
    running, files = start(tmp_path, settings, 2)
    while not (settings.run / "metrics.jsonl").exists() or not support.metrics(settings.run):
        assert all(process.is_alive() for process in running), files[0].read_text()
        time.sleep(0.02)
    os.kill(running[1].pid, signal.SIGTERM)
    first, said = finish(running, files)
    stopped = checkpoint.latest_step(settings.run, 1)
    assert f"SIGTERM: stopped after step {stopped}, saved" in said[0] and "U-Net" not in said[1]

    settings = dataclasses.replace(settings, steps=stopped + 2, resume=True)
    second, said = finish(*start(tmp_path, settings, 4))
    assert f"U-Net 1 is at step {stopped + 2}" in said[0]

    (tmp_path / "one").mkdir()
    alone = support.settings(tmp_path / "one", steps=stopped + 2, **same)
    layout = make_layout(mesh, rows=alone.rows, min_size=0)
    whole, make_train_step = watched(layout, alone)
    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    assert loop.run(alone, 1, layout)
    for number, seen in ((0, first), (stopped, second)):
        assert sorted({row for process in seen for row in process["rows"]}) == [0, 1, 2, 3]
        for process in seen:
            rows = process.pop("rows")
            assert {f"images{number}", f"text{number + 1}", "noise0", "times1"} < set(process)
            for name, own in process.items():
                np.testing.assert_array_equal(own, whole[name][rows], err_msg=name)
    for item in ("params", "ema"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
            support.saved(settings.run, stopped + 2, item),
            support.saved(alone.run, stopped + 2, item),
        )
    steps = [line["step"] for line in support.metrics(settings.run)]
    assert steps == list(range(1, stopped + 3))
    assert checkpoint.read_config(settings.run) == support.CASCADE


def test_clusters_are_found_and_laptops_left_alone():
    step = dict(SLURM_JOB_ID="7", SLURM_STEP_NUM_TASKS="8")
    for environment, found in (
        ({}, False),
        (dict(SLURM_JOB_ID="7"), False),  # a shell within an allocation
        (dict(SLURM_JOB_ID="7", SLURM_STEP_NUM_TASKS="1"), False),
        (step, True),
        (dict(OMPI_COMM_WORLD_SIZE="2"), True),
        (dict(KUBERNETES_SERVICE_HOST="10.0.0.1"), False),  # one pod
        (dict(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="0"), True),
    ):
        assert distributed.in_cluster(environment | dict(JAX_PLATFORMS="cpu")) == found


def test_gpus_of_a_task():
    def devices(**environment):
        return distributed.local_devices(environment)

    eight = ",".join(map(str, range(8)))
    assert devices() is None
    assert devices(CUDA_VISIBLE_DEVICES=eight) is None
    # Eight tasks a machine that all see all: JAX's own choice, the number of the task.
    assert devices(SLURM_STEP_TASKS_PER_NODE="8(x2)", CUDA_VISIBLE_DEVICES=eight) is None
    # Each sees its own alone.
    assert devices(SLURM_STEP_TASKS_PER_NODE="8(x2)", CUDA_VISIBLE_DEVICES="5") == [0]
    # One task a machine, with all of its GPUs.
    assert devices(SLURM_STEP_TASKS_PER_NODE="1(x2)", CUDA_VISIBLE_DEVICES=eight) == [*range(8)]
    assert devices(OMPI_COMM_WORLD_LOCAL_SIZE="2", CUDA_VISIBLE_DEVICES="GPU-1f") == [0]


def test_mistakes(monkeypatch):
    with pytest.raises(ValueError, match="go together"):
        distributed.start("localhost:1", None, 2)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    with pytest.raises(ValueError, match=re.escape("pip install 'imagen-jax[k8s]'")):
        distributed.start()
    distributed.start(num_processes=1)  # stays alone
    with pytest.raises(ValueError, match=re.escape("--process-id 2 is none of 0 .. 1")):
        distributed.start("localhost:1", 2, 2)
