"""Counts what is compiled."""

import contextlib
import re
from collections.abc import Iterator

import jax

PROGRAMS = {"jit(start)", "jit(advance)", "jit(finish)"}
"""Of a stage's sampling."""


@contextlib.contextmanager
def compilations(caplog) -> Iterator[list[str]]:
    """The programs that are compiled meanwhile, as JAX logs them."""
    names = []
    caplog.clear()
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        yield names
    for record in caplog.records:
        if found := re.match(r"Finished XLA compilation of (jit\(\w+\))", record.getMessage()):
            names.append(found[1])
