"""A trainer killed at random moments, saving included, loses nothing but the steps since the last
save, and ends as if it had never been stopped."""

import os
import random
import signal
import time

import pytest

import commands
from imagen_jax import checkpoint
from tests import RUN_ONCE
from tests.train import forked, support
from train import loop, step

# How one life after another ends, and when: at any time, start included; some steps later; or as
# soon as a step is being written.
DEATHS = (
    (signal.SIGKILL, "any time"),
    (signal.SIGTERM, "steps later"),
    (signal.SIGKILL, "writing"),
    (signal.SIGINT, "steps later"),
    (signal.SIGKILL, "steps later"),
)
LATER = 6  # steps, at most


def life(settings) -> None:
    step._compiler_options = lambda *_: RUN_ONCE
    commands.run(lambda: loop.run(settings, 1))


def start(settings):
    """A process of the trainer."""
    said = settings.run.parent / "said.txt"
    return forked.start(life, settings, said=said, environment={})


def logged(settings) -> int:
    return max((line["step"] for line in support.metrics(settings.run)), default=0)


def half_written(settings) -> list:
    """What Orbax has begun to write; left behind by a death until the next life clears it away."""
    return list((settings.run / "unet1").glob("*tmp*"))


def survive(folder, deaths: int, seed: int) -> None:
    steps, in_writing = 12 * (deaths + 1), 0
    every_step = dict(steps=steps, save_every=1, keep=2, resume=True)
    (folder / "straight").mkdir()
    straight = support.settings(folder / "straight", **every_step)
    uninterrupted = start(straight)
    settings, chance = support.settings(folder, **every_step), random.Random(seed)
    uninterrupted.join()
    assert uninterrupted.exitcode == 0
    for number in range(deaths):
        before, (sent, when) = logged(settings), DEATHS[number % len(DEATHS)]
        process = start(settings)
        if when == "any time":
            time.sleep(chance.uniform(0, 3))
        else:
            # After SIGKILL, more steps than may be lost.
            least = before + chance.randint(4 if sent == signal.SIGKILL else 1, LATER)
            while logged(settings) < least and process.is_alive():
                time.sleep(0.01)
        while when == "writing" and not half_written(settings) and process.is_alive():
            time.sleep(0.001)
        os.kill(process.pid, sent)
        process.join()
        in_writing += bool(half_written(settings))
        last, saved = logged(settings), checkpoint.latest_step(settings.run, 1) or 0
        told = (number, sent, process.exitcode, last, saved)
        if sent == signal.SIGKILL:
            # Of a step that was begun, the last but one is whole: a save waits for the one before.
            assert process.exitcode == -sent and saved >= last - 2, told
        else:
            assert process.exitcode == 0 and saved == last > before, told
    assert in_writing >= deaths // len(DEATHS)
    final = start(settings)
    final.join()
    assert final.exitcode == 0
    for item in ("params", "ema", "opt_state"):
        support.assert_equal(
            support.saved(settings.run, steps, item), support.saved(straight.run, steps, item)
        )
    exact = ("loss", "grad_norm", "learning_rate")
    lines = support.metrics(straight.run)
    want = {line["step"]: [line[name] for name in exact] for line in lines}
    got = [(line["step"], [line[name] for name in exact]) for line in support.metrics(settings.run)]
    assert {step for step, _ in got} == set(want) == set(range(1, steps + 1))
    assert all(values == want[step] for step, values in got)


def test_six_deaths(tmp_path):
    survive(tmp_path, 6, seed=1)


@pytest.mark.long
def test_thirty_deaths(tmp_path):
    survive(tmp_path, 30, seed=2)
