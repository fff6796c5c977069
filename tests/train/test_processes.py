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
from PIL import Image

import commands
from commands import processes
from imagen_jax import checkpoint, distributed, run_config
from imagen_jax.sharding import make_layout
from tests import XLA_FLAGS
from tests.train import forked, support
from tests.train.process import train, watched
from train import loop

DEVICES = 4


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(folder: Path, settings, processes: int, **own) -> tuple[list[BaseProcess], list[Path]]:
    """Starts the settings by so many processes; each says and notes what it does in a file. `own`
    are settings with a value for each."""
    port = free_port()
    flags = [f"--xla_force_host_platform_device_count={DEVICES // processes}", *XLA_FLAGS]
    files = [folder / f"{processes}-{number}" for number in range(processes)]
    running = []
    for number, file in enumerate(files):
        told = dict(coordinator=f"localhost:{port}", process_id=number, num_processes=processes)
        told |= {name: values[number] for name, values in own.items()}
        args = (dataclasses.replace(settings, **told), file)
        running.append(
            forked.start(train, *args, said=file, environment={"XLA_FLAGS": " ".join(flags)})
        )
    return running, files


def finish(running: list[BaseProcess], files: list[Path]) -> tuple[list[dict], list[str]]:
    """What each process has seen, and said."""
    codes = [forked.join(process, 240) for process in running]
    said = [file.read_text() for file in files]
    assert not any(codes), said
    return [dict(np.load(f"{file}.npz")) for file in files], said


def pictures(folder: Path, count: int, broken: int) -> Path:
    """A folder of captioned pictures, each of a colour; one is cut off behind its header."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), (20 * i, 200 - 20 * i, 0)).save(folder / f"{i}.png")
        # One is longer than the shortest batch of tokens: the processes agree on its length.
        (folder / f"{i}.txt").write_text(f"colour {i}" + ", such a colour" * 12 * (i == 2))
    cut = folder / f"{broken}.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    return folder


def here(settings, monkeypatch) -> dict:
    """Runs the settings in this process; what it has seen."""
    layout = make_layout(settings.mesh, rows=settings.rows, min_size=0)
    with monkeypatch.context() as patch:
        seen, make_train_step = watched(layout, settings)
        patch.setattr(loop, "make_train_step", make_train_step)
        assert loop.run(settings, 1, layout)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "then"),
    [
        ("4x1", 1),
        pytest.param("4x1", 4, marks=pytest.mark.long),
        pytest.param("2x2", 4, marks=pytest.mark.long),
    ],
)
def test_processes_are_one(tmp_path, monkeypatch, mesh, then):
    """Two, of which one is sent SIGTERM; then another number; then one alone, for comparison. A
    broken picture is in the second half of the first batch, which process 0 does not read."""
    data = pictures(tmp_path / "pictures", 9, broken=5)
    same = dict(mesh=mesh, eps=1e-3, flip=True, save_every=1000, data=(str(data),), limit=None)
    same |= dict(heldout_fraction=0.0, sample_steps=2)
    settings = support.settings(tmp_path, steps=1000, **same)
    running, files = start(tmp_path, settings, 2)
    forked.wait(
        lambda: support.metrics(settings.run) or not all(p.is_alive() for p in running), "a step"
    )
    assert all(process.is_alive() for process in running), files[0].read_text()
    os.kill(running[1].pid, signal.SIGTERM)
    first, said = finish(running, files)
    stopped = checkpoint.latest_step(settings.run, 1)
    assert f"SIGTERM: stopped after step {stopped}, saved" in said[0]
    assert "left out: 1, all listed in" in said[0]
    assert said[0].count("1  corrupt picture (5.png)") == 1
    assert said[1] == ""

    settings = dataclasses.replace(settings, steps=stopped + 2, resume=True)
    if then == 1:
        second = [here(settings, monkeypatch)]
    else:
        settings = dataclasses.replace(settings, sample_every=stopped + 2)
        second, said = finish(*start(tmp_path, settings, then))
        assert f"U-Net 1 is at step {stopped + 2}" in said[0]
        assert (settings.run / "samples" / f"unet1-{stopped + 2:07d}.png").exists()

    (tmp_path / "one").mkdir()
    alone = support.settings(tmp_path / "one", steps=stopped + 2, **same)
    whole = here(alone, monkeypatch)
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
    assert run_config.read(settings.run) == support.CASCADE


def join(told: dict, ready: Path) -> None:
    processes.start(**told)
    ready.write_text("")
    time.sleep(120)


def test_a_signal_before_the_loop_ends_a_process(tmp_path):
    """JAX's preemption service would take SIGTERM for itself, and nobody would hear of it."""
    running, port = [], free_port()
    ready = [tmp_path / f"ready{number}" for number in range(2)]
    for number, file in enumerate(ready):
        told = dict(coordinator=f"localhost:{port}", process_id=number, num_processes=2)
        said = tmp_path / f"said{number}"
        running.append(forked.start(join, told, file, said=said, environment={}))
    forked.wait(lambda: all(file.exists() for file in ready), "both processes")
    for process in reversed(running):
        os.kill(process.pid, signal.SIGTERM)
        assert forked.join(process, 20) == -signal.SIGTERM


def test_what_goes_wrong_in_one_process_goes_wrong_in_all(tmp_path):
    settings = support.settings(tmp_path, mesh="4x1")
    running, files = start(tmp_path, settings, 2, data=[("bundled",), ("nowhere",)])
    assert [forked.join(process, 60) for process in running] == [1, 1]
    said = [file.read_text().splitlines()[-1] for file in files]
    assert said[1].startswith("error: no source 'nowhere'")
    assert said[0] == said[1].replace("error: ", "error: process 1: ")


def fail_alone(given: dict) -> None:
    def main():
        processes.start(**given)
        distributed.gather("here")
        if given["process_id"] == 1:
            raise KeyError("missing")
        time.sleep(120)  # as in a collective that process 1 never enters

    commands.run(main)


def test_a_failure_in_one_process_ends_the_others_at_once(tmp_path):
    port, running = free_port(), []
    said = [tmp_path / f"said{number}" for number in range(2)]
    for number, file in enumerate(said):
        given = dict(coordinator=f"localhost:{port}", process_id=number, num_processes=2)
        running.append(forked.start(fail_alone, given, said=file, environment={}))
    assert [forked.join(process) for process in running] == [1, 1]
    assert "Traceback" in said[1].read_text() and "KeyError: 'missing'" in said[1].read_text()
    assert said[0].read_text().splitlines()[-1] == "error: process 1: KeyError: 'missing'"


@pytest.mark.parametrize("holds_steps", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_folder_that_not_all_processes_share(tmp_path, holds_steps):
    """Each process has a folder of its own; in one case the first holds a step already."""
    workdirs = (tmp_path / "first", tmp_path / "second")
    message = "process 1 of 2 does not see what process 0 wrote in .*: --workdir"
    if holds_steps:
        (workdirs[0] / "unet1" / "4").mkdir(parents=True)
        message = "the processes see different steps in .*unet1"
    settings = support.settings(tmp_path, mesh="4x1", resume=True)
    running, files = start(tmp_path, settings, 2, workdir=workdirs)
    assert [forked.join(process) for process in running] == [1, 1]
    for file in files:
        assert re.match(f"error: .*{message}", file.read_text().splitlines()[-1])


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
        assert processes.in_cluster(environment | dict(JAX_PLATFORMS="cpu")) == found


def test_gpus_of_a_task():
    def devices(**environment):
        return processes.local_devices(environment)

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
    with pytest.raises(ValueError, match="must be given together"):
        processes.start("localhost:1", None, 2)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    with pytest.raises(ValueError, match=re.escape("pip install -e '.[k8s]'")):
        processes.start()
    processes.start(num_processes=1)  # stays alone
    with pytest.raises(ValueError, match=re.escape("--process-id 2 is not in 0 .. 1")):
        processes.start("localhost:1", 2, 2)
