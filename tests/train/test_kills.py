"""A trainer killed at random moments, saving included, loses nothing but the steps since the last
save, and ends as if it had never been stopped."""

import json
import os
import random
import signal
import time

import pytest

from imagen_jax import checkpoint, commands
from tests import RUN_ONCE
from tests.train import forked, support
from train import loop, step

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)


def life(settings) -> None:
    step._compiler_options = lambda *_: RUN_ONCE
    commands.run(lambda: loop.run(settings, 1))


def start(settings):
    """A process of the trainer."""
    said = settings.run.parent / "said.txt"
    return forked.start(life, settings, said=said, environment={})


def lines(run) -> list[dict]:
    """Whole lines of metrics; the last of a killed process may be torn."""
    if not (run / "metrics.jsonl").exists():
        return []
    text = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in text if line.endswith("}") and '"train"' in line]


def survive(folder, deaths: int, seed: int) -> None:
    steps, died = 8 * deaths, 0
    every_step = dict(steps=steps, save_every=1, keep=2, resume=True)
    (folder / "straight").mkdir()
    straight = support.settings(folder / "straight", **every_step)
    uninterrupted = start(straight)
    settings, chance = support.settings(folder, **every_step), random.Random(seed)
    uninterrupted.join()
    assert uninterrupted.exitcode == 0
    for number in range(deaths):
        saved, seen = checkpoint.latest_step(settings.run, 1) or 0, len(lines(settings.run))
        process, kind = start(settings), SIGNALS[number % len(SIGNALS)]
        if number % 3:  # else the moment may lie before the first step
            while len(lines(settings.run)) == seen and process.is_alive():
                time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.2 if number % 3 else 3))
        os.kill(process.pid, kind)
        process.join()
        died += process.exitcode == -signal.SIGKILL
        now = checkpoint.latest_step(settings.run, 1) or 0
        assert now >= saved, (number, kind, saved, now)
    assert died >= deaths // 3  # the others heard a signal that asks them to stop
    last = start(settings)
    last.join()
    assert last.exitcode == 0
    for item in ("params", "ema", "opt_state"):
        support.assert_equal(
            support.saved(settings.run, steps, item), support.saved(straight.run, steps, item)
        )
    exact = ("loss", "grad_norm", "learning_rate")
    want = {line["step"]: [line[name] for name in exact] for line in lines(straight.run)}
    got = [(line["step"], [line[name] for name in exact]) for line in lines(settings.run)]
    assert {step for step, _ in got} == set(want) == set(range(1, steps + 1))
    assert all(values == want[step] for step, values in got)


def test_six_deaths(tmp_path):
    survive(tmp_path, 6, seed=1)


@pytest.mark.long
def test_thirty_deaths(tmp_path):
    survive(tmp_path, 30, seed=2)
