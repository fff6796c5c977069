"""The commands as a user runs them: flags, mistakes, Ctrl-C, a full disk."""

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import commands
import imagen_jax
from imagen_jax import checkpoint, presets, run_config
from imagen_jax.config import ImagenConfig
from imagen_jax.errors import UserError
from tests.train import support
from train import base, loop, super_res
from train.settings import SECTIONS, Settings

ROOT = Path(__file__).parents[2]
SHORT = ("--limit", "8", "--batch-size", "4", "--eval-batches", "1", "--sample-every", "0",
         "--mesh", "1x1")  # fmt: skip


def run_main(monkeypatch, main, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["train/base.py", *map(str, arguments)])
    monkeypatch.setattr(commands, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(commands, "keep_writers_logs", list)
    commands.run(main)


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", "-m", "train.base", *SHORT, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes)


def test_help_teaches(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_main(monkeypatch, base.main, "--help")
    text = capsys.readouterr().out
    assert "usage: python -m train.base" in text
    for section in SECTIONS:
        assert f"{section.__name__.lower()} options" in text
        assert section.__doc__ in " ".join(text.split()).replace(" │ │ ", " ")
    assert "--no-no-captions" not in text
    for field in Settings.__dataclass_fields__:
        assert commands.flag(field) in text


def test_help_shows_the_defaults_of_the_recipe(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments, number in (((), 1), (("--preset=scenes", "--unet_number", "2"), 2)):
        main = base.main if number == 1 else super_res.main
        with pytest.raises(SystemExit, match="0"):
            run_main(monkeypatch, main, *arguments, "--help")
        recipe = presets.RECIPES["scenes" if arguments else "demo"][number - 1]
        text = " ".join(capsys.readouterr().out.split())
        for value in (recipe.steps, recipe.batch_size, recipe.optimizer, recipe.lr):
            assert f"(default: {value})" in text


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Settings and number of the U-Net that a command line says, in an empty folder."""
    found = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "run", lambda *given: found.append(given))

    def parse(main, *arguments):
        run_main(monkeypatch, main, *arguments)
        return found[-1]

    return parse


def test_a_run_says_what_its_other_stages_are(parsed, tmp_path):
    """Cascade, pictures and recipe of another stage; a flag changes each."""
    run = tmp_path / "runs" / "demo"
    first = Settings(preset="scenes", data=("scenes",), flip=True, steps=9, workdir=run)
    run_config.write(run, first.cascade(), {"unet1": first.record()})
    recipe = dataclasses.asdict(presets.RECIPES["scenes"][1])
    place = dict(config=run / "config.json", workdir=run)
    wanted = Settings(preset="scenes", data=("scenes",), flip=True, **place, **recipe)
    said, number = parsed(super_res.main, "--workdir", run)
    assert said.cascade() == first.cascade() and number == 2
    assert said == wanted and parsed(super_res.main)[0].cascade() == wanted.cascade()
    said, _ = parsed(super_res.main, "--workdir", run, "--data", "bundled", "--steps", "3")
    assert said == dataclasses.replace(wanted, data=("bundled",), steps=3)
    said, _ = parsed(super_res.main, "--workdir", run, "--resume")  # nothing of it is there yet
    assert said == dataclasses.replace(wanted, resume=True)
    said, _ = parsed(super_res.main, "--workdir", run, "--preset", "tiny")
    assert said.cascade() == presets.tiny() and said.data == ("bundled",)


@pytest.mark.parametrize("flag", ["--init-from", "--continue-from"])
def test_weights_bring_their_cascade(parsed, tmp_path, flag):
    """That of a converted model; a folder without one is refused at once."""
    there, cascade = tmp_path / "converted", presets.tiny()
    run_config.write(there, cascade)
    said, _ = parsed(base.main, flag, there, "--workdir", tmp_path / "mine")
    assert (said.cascade(), said.run.name, said.data) == (cascade, "mine", ("bundled",))
    assert parsed(base.main, f"{flag}={there}", "--preset", "demo")[0].cascade() == presets.demo()
    with pytest.raises(SystemExit, match="absent is not a run directory"):
        parsed(base.main, flag, "absent", "--workdir", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_flags_become_settings(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_main(monkeypatch, base.main, "--preset", "tiny", "--print-config")
    assert ImagenConfig.from_dict(json.loads(capsys.readouterr().out)).image_sizes == (8, 16)
    told = {}
    monkeypatch.setattr(base.loop, "run", lambda *given: told.update(given=given))
    run_main(
        monkeypatch, super_res.main, "--unet-number", "sr256", "--no-captions", "--keep", "None",
        "--max-grad-norm", "None", "--steps", "7", "--flip", "--log-every", "3",
    )  # fmt: skip
    recipe = dataclasses.asdict(presets.RECIPES["demo"][1]) | dict(steps=7)
    wanted = Settings(
        preset="demo",
        no_captions=True,
        keep=None,
        max_grad_norm=None,
        flip=True,
        log_every=3,
        **recipe,
    )
    assert told["given"] == (wanted, 2)


def test_a_batch_of_the_recipe_is_split(monkeypatch):
    """What is checked is what is trained with: not the default that the recipe replaces."""
    told = {}
    monkeypatch.setattr(base.loop, "run", lambda *given: told.update(given=given))
    run_main(monkeypatch, base.main, "--preset", "imagen", "--accumulate", "64")
    assert (told["given"][0].batch_size, told["given"][0].rows) == (2048, 32)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (super_res.main, ("--unet-number", "sr"), "error: 'sr' is not a stage: give its number"),
        (super_res.main, ("--unet-number", "base"), "error: U-Net 1 is the base"),
        (base.main, ("--steps", "0"), "error: --steps 0: must be at least 1"),
        (base.main, ("--keep", "0"), "error: --keep 0: must be at least 1"),
        (base.main, ("--seed", str(2**32)), "error: --seed 4294967296: must be less than 2"),
        (base.main, ("--lr", "-1"), "error: --lr -1.0: must be more than 0"),
        (base.main, ("--ema-decay", "1"), "error: --ema-decay 1.0: must be 0 or more and less"),
        (
            base.main,
            ("--batch-size", "4", "--accumulate", "3"),
            "--batch-size 4 cannot be split into --accumulate 3",
        ),
        (base.main, ("--mesh", "8y1"), "error: --mesh 8y1: must be auto, or DATAxMODEL as in 8x1"),
        (base.main, ("--process-id", "0"), "--coordinator, --process-id and --num-processes must"),
        (base.main, ("--no-captions", "--t5", "demo"), "error: --t5 is not used in a cascade"),
        (base.main, ("--config", "absent.json"), "error: .*No such file"),
    ],
)
def test_mistaken_flags(monkeypatch, main, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run_main(monkeypatch, main, *arguments)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"image_size": 8}', "no field 'image_size'; did you mean 'image_sizes'?"),
        ('{"unets": [{}], "image_sizes": 8}', "UnetConfig needs the field 'dim'"),
        ("[1, 2]", "must contain a JSON object, not list"),
        ('{"imagen": 3}', "'imagen' is not a JSON object"),
        ('{"type": "original", "imagen": {"image_sizes": 8}}', "cascade.json: .*'unets'"),
        ("{", "is not JSON"),
    ],
)
def test_mistaken_files(monkeypatch, tmp_path, written, message):
    file = tmp_path / "cascade.json"
    file.write_text(written)
    with pytest.raises(SystemExit, match=message):
        run_main(monkeypatch, base.main, "--config", file)


def test_the_file_of_the_references_cli(monkeypatch, tmp_path, capsys):
    """Of its imagen_config.json the cascade; what trains it are flags here."""
    unet = dict(dim=8, dim_mults=[1, 2], cond_dim=8)
    imagen = dict(video=False, image_sizes=[8, 16], timesteps=[10, 20], unets=[unet, unet])
    written = {"type": "original", "imagen": imagen, "trainer": {"lr": 1e-4}}
    file = tmp_path / "imagen_config.json"
    file.write_text(json.dumps(written))
    run_main(monkeypatch, base.main, "--config", file, "--print-config")
    found = ImagenConfig.from_dict(json.loads(capsys.readouterr().out))
    assert (found.image_sizes, found.timesteps, found.unets[1].dim) == ((8, 16), (10, 20), 8)
    assert found.unets[1].lowres_cond
    file.write_text(
        json.dumps(written | {"imagen": imagen | dict(image_sizes=[8], timesteps=10, unets=unet)})
    )
    run_main(monkeypatch, base.main, "--config", file, "--print-config")
    assert len(json.loads(capsys.readouterr().out)["unets"]) == 1
    file.write_text(json.dumps(written | {"imagen": imagen | {"video": True}}))
    with pytest.raises(SystemExit, match="imagen_config.json: this is a video cascade"):
        run_main(monkeypatch, base.main, "--config", file)


def test_a_full_device_is_one_line(monkeypatch):
    def full():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to")

    monkeypatch.setattr(commands, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(commands, "keep_writers_logs", list)
    with pytest.raises(SystemExit, match="error: the device is out of memory"):
        commands.run(full)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("--lr 0"), r"error: --lr 0$"),
        (OSError("no space"), r"error: no space \(traceback in .*error\.log\)"),
    ],
)
def test_a_failure_leaves_its_traceback_in_the_run(monkeypatch, tmp_path, error, line):
    def main():
        commands.errors_go_to(tmp_path)
        logging.getLogger("absl").error("array 7 was not written")
        raise error

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit, match=line):
        commands.run(main)
    log = (tmp_path / "error.log").read_text()
    assert "raise error" in log and "array 7 was not written" in log


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    """ValueErrors of JAX and NumPy are bugs of ours, not mistakes of a user."""
    monkeypatch.setattr(commands, "_error_log", tmp_path / "error.log")
    monkeypatch.setattr(commands, "keep_writers_logs", list)
    with pytest.raises(ValueError, match="reshape"):
        commands.run(lambda: np.zeros(3).reshape(2, 2))
    assert "cannot reshape array" in (tmp_path / "error.log").read_text()


@pytest.mark.parametrize(
    "message, line",
    [
        ("RESOURCE_EXHAUSTED: Out of memory", "error: the device is out of memory: try a smaller"),
        ("UNAVAILABLE: TPU 3\nis gone", "error: a device stopped responding: UNAVAILABLE: TPU 3"),
        (
            "INTERNAL: CUDA_ERROR_ECC_UNCORRECTABLE: x",
            "error: a device stopped responding: INTERNAL",
        ),
    ],
)
def test_a_device_that_is_full_or_gone_is_one_line(monkeypatch, message, line):
    monkeypatch.setattr(commands, "keep_writers_logs", list)

    def main() -> None:
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(SystemExit) as ended:
        commands.run(main)
    assert str(ended.value).startswith(line) and "\n" not in str(ended.value)


@pytest.mark.slow
def test_super_resolution_by_name(monkeypatch, tmp_path, capsys):
    file = support.settings(tmp_path).config
    run_main(
        monkeypatch, super_res.main, "--config", file, "--unet-number", "sr256", "--workdir",
        tmp_path / "run", "--optimizer", "muon", "--moments", "bfloat16", "--steps", "1",
        "--limit", "8", "--batch-size", "4", "--eval-batches", "1", "--sample-steps", "2",
        "--mesh", "1x1",
    )  # fmt: skip
    assert checkpoint.latest_step(tmp_path / "run", 2) == 1
    assert (tmp_path / "run" / "samples" / "unet2-0000001.png").exists()
    assert "U-Net 2 of 2: 8 x 8 -> 12 x 12 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    "sent", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_to_all_saves_and_the_same_command_goes_on(tmp_path, sent):
    """A terminal sends SIGINT to every process of the command, those that decode included, and
    Slurm SIGTERM."""
    settings = support.settings(tmp_path)
    told = ("--config", settings.config, "--workdir", settings.run, "--log-every", "1")
    process = start(*told, "--steps", "100000", "--workers", "1")
    metrics, deadline = settings.run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    os.killpg(process.pid, sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    step = checkpoint.latest_step(settings.run, 1)
    assert step >= 1
    assert f"{sent.name}: stopped after step {step}, saved in {settings.run}" in out
    assert "--resume" in out
    # Nothing but the bar, which says how long it will take, and the loss.
    assert all(line.startswith("U-Net 1: ") for line in err.split("\n") if line), err
    assert re.search(r"<\d+:\d\d.*loss=\d", err)


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path):
    """A limit on the size of files stands for the disk: Orbax meets it in its threads."""
    settings = support.settings(tmp_path)
    process = subprocess.run(
        ["bash", "-c", 'ulimit -f 20 && exec "$@"', "bash", sys.executable, "-m", "train.base",
         *SHORT, "--config", settings.config, "--workdir", settings.run, "--steps", "2",
         "--save-every", "1"],
        # The limit truncates what is compiled too: not in the cache that other tests read.
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == (
        f"error: could not save step 1 in {settings.run}: File too large. Nothing was saved before."
    )
    assert "Traceback" not in process.stderr
    assert checkpoint.latest_step(settings.run, 1) is None
    assert imagen_jax.load(settings.run).unets[0].__class__ is imagen_jax.NullUnet


def test_resume_alone_takes_the_recorded_settings(monkeypatch, tmp_path, capsys):
    """Flags that are given change them, and are said; what cannot change is refused by name."""
    settings, given = support.settings(tmp_path), []
    train = loop.run
    run_main(
        monkeypatch, base.main, "--config", settings.config, "--workdir", settings.run, *SHORT,
        "--steps", "1", "--flip", "--lr", "2e-4", "--max-grad-norm", "None",
    )  # fmt: skip
    settings.config.unlink()  # the run has its own
    monkeypatch.setattr(base.loop, "run", lambda *told: given.append(told[0]) or train(*told))
    resume = ("--workdir", settings.run, "--resume")
    run_main(monkeypatch, base.main, *resume)
    assert (given[0].flip, given[0].lr, given[0].max_grad_norm) == (True, 2e-4, None)
    assert (given[0].steps, given[0].batch_size, given[0].limit) == (1, 4, 8)
    capsys.readouterr()
    run_main(monkeypatch, base.main, *resume, "--steps", "2", "--lr", "1e-4", "--beta1", "0.8",
             "--flip")  # fmt: skip
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert said == [
        "changed: --steps was 1 and is 2",
        "changed: --lr was 0.0002 and is 0.0001",
        "changed: --beta1 was 0.9 and is 0.8",
    ]
    for refused, message in (
        (("--seed", "1"), "--seed was 0 and is 1"),
        (("--no-flip",), "--flip was True and is False"),
        (("--preset", "tiny"), "describes another cascade"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_main(monkeypatch, base.main, *resume, "--steps", "3", *refused)
