"""What every command sets up for its process, seen from a process of its own."""

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from imagen_jax import errors
from imagen_jax.errors import UserError, flags, parse

STEPS = """
import resource
import commands
commands.keep_memory()
import jax, jax.numpy as jnp
x = jnp.ones((4096, 4096))
step = jax.jit(lambda x: jnp.sort(x, axis=0).sum(axis=0))  # a temporary of 64 MiB
faults = []
for _ in range(20):
    jax.block_until_ready(step(x[:2048] + 1))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[9])
"""
PRECISION = """
import commands, jax
for dtype in ("bfloat16", "float32"):
    commands.use_precision(dtype)
    print(jax.config.jax_default_matmul_precision)
"""


def run(code: str, **environment: str) -> list[str]:
    environment = os.environ | {"XLA_FLAGS": ""} | environment
    if not environment["JAX_DEFAULT_MATMUL_PRECISION"]:
        del environment["JAX_DEFAULT_MATMUL_PRECISION"]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "confstr"), reason="asks for the C library by os.confstr")
def test_steps_keep_their_memory():
    if "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        pytest.skip("mallopt is glibc's")
    (faults,) = run(STEPS)
    assert int(faults) < 10 * 8192  # 10 steps, of more than 16,384 pages each


def test_float32_is_computed_in_float32_unless_the_user_says_otherwise():
    assert run(PRECISION, JAX_DEFAULT_MATMUL_PRECISION="") == ["None", "highest"]
    assert run(PRECISION, JAX_DEFAULT_MATMUL_PRECISION="tensorfloat32")[1] == "tensorfloat32"


def test_commands_of_the_library_do_not_repeat_what_orbax_warns_of(caplog):
    logger = logging.getLogger("absl")
    level = logger.level
    try:
        errors.run(lambda: logger.warning("Metadata file does not exist: params"))
    finally:
        logger.setLevel(level)
    assert not caplog.records
    logger.warning("another program's")
    assert len(caplog.records) == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inherited:
    folder: Path
    """Where to read
    from."""
    seed: int = 3
    """Seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfCommand(Inherited):
    """A command."""

    note: Annotated[str | None, tyro.conf.arg(aliases=["--remark"])] = None
    """What to say. Default:
    `nothing` at all."""
    parts: tuple[int, ...] = ()
    """Parts."""

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: at least 0.")


def test_help_fills_its_lines_and_begins_with_a_commands_own_flags(capsys):
    """Its paragraphs are not cut where the docstring's lines end, and None is no default."""
    with pytest.raises(SystemExit, match="0"):
        parse(OfCommand, prog="p", description="d", args=["--help"])
    text = capsys.readouterr().out
    flat = " ".join(text.replace("│", " ").split())
    assert "Where to read from. (required)" in text
    assert "What to say. Default: `nothing` at all. --parts" in flat
    assert "Seed. (default: 3)" in flat and "None" not in flat and "--remark" in flat
    places = [flat.index(said) for said in ("Where to", "What to", "Parts.", "Seed.")]
    assert places == sorted(places)


def test_flags_are_checked_after_they_are_parsed():
    given = parse(OfCommand, prog="p", description="d", args=["--folder", "x", "--remark", "y"])
    assert given == OfCommand(folder=Path("x"), note="y")
    with pytest.raises(UserError, match="--seed -1: at least 0"):
        parse(OfCommand, prog="p", description="d", args=["--folder", "x", "--seed", "-1"])
    form = flags(OfCommand, defaults=OfCommand(folder=Path("a"), seed=7))
    assert form() == form(folder=Path("a"), seed=7)
