"""Several processes as one program, each with some of the devices.

Every process runs the same commands in the same order on its own rows; process 0 alone prints, and
writes what is not an array.
"""

import contextlib
import json
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from imagen_jax.errors import UserError


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
    """If the body raises in one process, it raises in all, so that none blocks in a collective.

    Nothing inside may wait for the others. Raises what was raised here; for an error of another
    process a UserError if it was one, else a RuntimeError.
    """
    error = None
    try:
        yield
    except BaseException as raised:
        error = raised
    own = None
    if error is not None:
        own = isinstance(error, (UserError, OSError)), str(error) or type(error).__name__
    every = [json.loads(text) for text in gather(json.dumps(own))]
    if error is not None:
        raise error
    for number, other in enumerate(every):
        if other is not None:
            users, text = other
            raise (UserError if users else RuntimeError)(f"process {number}: {text}")
