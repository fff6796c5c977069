"""Several processes that run as one program, each with some of the devices.

Every process runs the same commands in the same order on its own rows; only process 0 prints, and
writes what is not an array.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator

import jax
import numpy as np
from jax._src.distributed import global_state  # its key-value store has no public name
from jax.experimental import multihost_utils

from imagen_jax.errors import UserError

_LONGEST_WAIT = 60 * 60 * 1000  # milliseconds; if a process fails, the others end long before
_agreements = itertools.count()


def talks() -> bool:
    """Whether this is the one process that prints, and writes what is not an array."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order. All of them must call this."""
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

    Nothing in the body may wait for other processes. Raises what was raised here; for an error in
    another process, UserError if it was a UserError or OSError, else RuntimeError.
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


class Agreement:
    """Numbers that all processes agree on, round after round, through JAX's coordinator.

    Nothing runs on a device, so a thread beside the training loop can use it. Every process must
    create its agreements in the same order, and take part in every round.
    """

    def __init__(self):
        self._name, self._rounds = f"imagen_jax/agreement{next(_agreements)}", itertools.count()

    def most(self, own: int) -> int:
        """The largest of the numbers that the processes give in this round. Waits for them."""
        count, number = jax.process_count(), next(self._rounds)
        if count == 1:
            return own
        store, this = global_state.client, f"{self._name}/{number}"
        store.key_value_set(f"{this}/{jax.process_index()}", str(own))
        if talks():
            keys = (f"{this}/{i}" for i in range(count))
            given = [store.blocking_key_value_get(key, _LONGEST_WAIT) for key in keys]
            store.key_value_set(f"{this}/most", str(max(map(int, given))))
            # A process that gives a number has read the result of the round before.
            store.key_value_delete(f"{self._name}/{number - 1}/")
        return int(store.blocking_key_value_get(f"{this}/most", _LONGEST_WAIT))
