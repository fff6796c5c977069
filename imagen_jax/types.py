"""Array vocabulary shared by every module: one letter per axis, one name per role.

Axes:  b batch · f frames · h, w pixels · p flattened pixels · c channels · l text tokens
       m conditioning tokens · d embedding · n heads · k the width of one head or of the
       conditioning vector
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Key

AnyArray = jax.Array | np.ndarray  # public calls accept NumPy
Size = tuple[int, int]  # (height, width) in pixels

Image = Float[AnyArray, "b h w c"]  # in [-1, 1] inside the diffusion, in [0, 1] in public calls
LogSNR = Float[AnyArray, "b"]
TextEmbeds = Float[AnyArray, "b l d"]
TextMask = Bool[AnyArray, "b l"]  # True marks a real token
KeepMask = Bool[AnyArray, "b"]  # True keeps the text, False replaces it by the null embedding
PRNGKey = Key[jax.Array, ""]
Params = dict[str, Any]  # a pure dict of arrays, nested as the module is


def pair(size: int | Size) -> Size:
    """A size as (height, width): one integer means a square."""
    return (size, size) if isinstance(size, int) else size
