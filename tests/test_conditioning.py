"""The closure in which networks and theory meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.conditioning import Condition, Conditioning, Guided
from imagen_jax.diffusion.guidance import Guidance, guide, make_interval
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
    guided = Guided(Condition(Learned(), Conditioning(text=keep)), Guidance(3.0, 0.25), True)(
        X, level
    )
    want = guide(2 * jnp.tanh(X), jnp.tanh(X), 3.0, keep_parallel_frac=0.25)
    np.testing.assert_allclose(guided[..., :3], want, rtol=1e-6)
    np.testing.assert_array_equal(guided[..., 3:], X + 5)


@pytest.mark.parametrize("interval, rows", [((0.0, 9.0), 4), ((0.0, 0.1), 2), (None, 4)])
def test_the_null_half_is_computed_where_guidance_acts(interval, rows):
    """Levels outside the interval cost one evaluation, and give the conditional output."""
    counted = []

    class Counted(Learned):
        def __call__(self, x, time, **conditioning):
            jax.debug.callback(lambda x: counted.append(len(x)), x)
            return super().__call__(x, time, **conditioning)

    keep = jnp.array([1.0, 0.0, 1.0, 0.0])
    level = VP().at(jnp.array([0.5, 0.5]))
    settings = Guidance(3.0, interval=interval and make_interval(interval))
    conditioned = Condition(Counted(), Conditioning(text=keep))
    output = jax.jit(lambda *inputs: Guided(conditioned, settings, False)(*inputs))(X, level)[
        ..., :3
    ]
    jax.effects_barrier()
    assert counted == [rows]
    want = jnp.tanh(X) * (2 if rows == 2 else 2 + 2.0)
    np.testing.assert_allclose(output, want, rtol=1e-6)
