"""A trainer killed at random moments, saving included, loses nothing but the steps since the last
save, and ends as if it had never been stopped."""

import functools
import os
import random
import signal
import time

import pytest

import commands
from imagen_jax import checkpoint
from tests.train import forked, support
from train import loop

# How one life after another ends, and when: as soon as a step is being written; some steps later;
# or at any time, start included.
DEATHS = (
    (signal.SIGKILL, "writing"),
    (signal.SIGTERM, "steps later"),
    (signal.SIGKILL, "any time"),
    (signal.SIGINT, "steps later"),
    (signal.SIGKILL, "steps later"),
)
LATER = 6  # steps, at most


def life(settings) -> None:
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
    steps, in_writing = (LATER + 4) * (deaths + 1), 0
    (folder / "straight").mkdir()
    straight = support.settings(folder / "straight", steps=steps, save_every=steps)
    settings = support.settings(folder, steps=steps, save_every=1, keep=2, resume=True)
    uninterrupted, chance = start(straight), random.Random(seed)
    assert forked.join(uninterrupted) == 0
    for number in range(deaths):
        before, (sent, when) = logged(settings), DEATHS[number % len(DEATHS)]
        process = start(settings)

        def reached(least: int, process=process) -> bool:
            return logged(settings) >= least or not process.is_alive()

        if when == "any time":
            time.sleep(chance.uniform(0, 3))
        else:
            # After SIGKILL, more steps than may be lost.
            least = before + chance.randint(4 if sent == signal.SIGKILL else 1, LATER)
            forked.wait(functools.partial(reached, least), f"step {least}")
        if when == "writing":
            forked.wait(
                lambda process=process: half_written(settings) or not process.is_alive(), "a save"
            )
        os.kill(process.pid, sent)
        code = forked.join(process)
        in_writing += bool(half_written(settings))
        last, saved = logged(settings), checkpoint.latest_step(settings.run, 1) or 0
        found = (number, sent, code, last, saved)
        if sent == signal.SIGKILL:
            # Of a step that was begun, the last but one is complete: a save waits for the one
            # before.
            assert code == -sent and saved >= last - 2, found
        else:
            assert code == 0 and saved == last > before, found
    assert in_writing >= -(-deaths // len(DEATHS))
    assert forked.join(start(settings)) == 0
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


@pytest.mark.slow
def test_three_deaths(tmp_path):
    survive(tmp_path, 3, seed=1)


@pytest.mark.long
def test_thirty_deaths(tmp_path):
    survive(tmp_path, 30, seed=2)
