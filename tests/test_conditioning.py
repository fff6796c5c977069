"""The closure in which networks and theory meet."""

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.conditioning import Condition, Conditioning, Guided
from imagen_jax.diffusion.guidance import guide
from imagen_jax.diffusion.vp import VP

X = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))


class Learned:
    """A network with a learned variance: six channels for three, other ones without text."""

    def encode_text(self, *_, **__): ...

    def __call__(self, x, time, *, text_cond, self_cond=None, **_):
        keep = text_cond[:, None, None, None]
        return jnp.concatenate([jnp.tanh(x) * (1 + keep), x + 5 * keep], -1)


def test_guidance_is_on_the_prediction_and_not_on_the_variance():
    keep = jnp.array([1.0, 0.0, 1.0, 0.0])
    level = VP().at(jnp.array([0.5, 2.0]))
    guided = Guided(Condition(Learned(), Conditioning(text=keep)), 3.0, 0.25, True)(X, level)
    want = guide(2 * jnp.tanh(X), jnp.tanh(X), 3.0, keep_parallel_frac=0.25)
    np.testing.assert_allclose(guided[..., :3], want, rtol=1e-6)
    np.testing.assert_array_equal(guided[..., 3:], X + 5)
