"""Training DeepFloyd IF's U-Net: its loss, text that is dropped, and a small one that learns."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import DiscreteConfig, Draws, Imagen, ImagenConfig, nn, run_config, text
from imagen_jax.diffusion.discrete import Discrete
from imagen_jax.diffusion.process import Level, q_sample
from imagen_jax.errors import UserError
from imagen_jax.if_config import IFUnetConfig
from tests.train.support import metrics
from train import base

UNET = dict(
    dim=32, dim_mults=(1, 2), num_resnet_blocks=1, layer_attns=(False, True), attn_dim_head=16,
    pool_heads=4, max_text_len=12,
)  # fmt: skip


def cascade(**more) -> ImagenConfig:
    return ImagenConfig(
        unets=IFUnetConfig(**UNET | more),
        image_sizes=8,
        text_encoder_name="demo",
        discrete=DiscreteConfig(),
        timesteps=100,
    )


def test_the_bound_of_the_variance_is_a_gaussians():
    """The KL of two Gaussians, and the mass of a bin; the noise learns from its error alone."""
    process, rng = Discrete(), np.random.default_rng(0)
    x0, noise, v = (rng.normal(size=(2, 4, 4, 3)).astype(np.float32) for _ in range(3))
    x0 = np.clip(x0, -1, 1)
    level = process.level(jnp.array([400.0, 0.0]))
    x = q_sample(x0, level, noise)

    def losses(eps, v):
        answer = jnp.concatenate([eps, v], -1)
        return process.losses(lambda *_: answer, x0, noise, level)

    eps = noise + 0.1
    total = losses(eps, v)
    error = np.mean((eps - noise) ** 2, axis=(1, 2, 3))
    f = (v + 1) / 2
    now, before = exact(process, [400.0, 0.0]), exact(process, [399.0, -1.0])
    beta = now.sigma**2 - (now.alpha / before.alpha) ** 2 * before.sigma**2
    one, zero = exact(process, [1.0]), exact(process, [0.0])
    first = zero.sigma**2 * (1 - (one.alpha * zero.sigma / (one.sigma * zero.alpha)) ** 2)
    short = np.where([False, True], first, beta * before.sigma**2 / now.sigma**2)
    beta, short = beta[:, None, None, None], short[:, None, None, None]
    var = np.exp(f * np.log(beta) + (1 - f) * np.log(short))

    def mean(estimate):
        a, b, c, d = (q[:, None, None, None] for q in (now.alpha, now.sigma, *before[:2]))
        return c * beta / b**2 * estimate + a / c * d**2 / b**2 * x

    estimate = np.asarray(x - process.level(now[3]).sigma[:, None, None, None] * eps)
    estimate = estimate / now.alpha[:, None, None, None]
    apart = (mean(x0) - mean(estimate)) ** 2
    kl = 0.5 * (np.log(var / short) - 1 + (short + apart) / var)
    np.testing.assert_allclose(total[0] - error[0], np.mean(kl[0]) / np.log(2), rtol=1e-3)
    cdf = jax.scipy.stats.norm.cdf
    centre, std = (x0 - mean(estimate))[1], np.sqrt(var[1])
    up, down = cdf((centre + 1 / 255) / std), cdf((centre - 1 / 255) / std)
    mass = np.where(x0[1] < -0.999, up, np.where(x0[1] > 0.999, 1 - down, up - down))
    likelihood = -np.mean(np.log(np.maximum(mass, 1e-12))) / np.log(2)
    np.testing.assert_allclose(total[1] - error[1], likelihood, rtol=1e-3)
    to_eps = jax.grad(lambda eps: losses(eps, v).sum())(jnp.asarray(eps))
    np.testing.assert_allclose(to_eps, 2 * (eps - noise) / eps[0].size, atol=1e-6)
    assert np.abs(jax.grad(lambda v: losses(eps, v).sum())(jnp.asarray(v))).max() > 1e-6


def exact(process: Discrete, steps: list[float]) -> Level:
    """The level in float64."""
    log_snr = np.asarray(process.level(jnp.array(steps)).log_snr, np.float64)
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))
    return Level(alpha, np.where(np.array(steps) < 0, 0.0, sigma), log_snr, np.float32(steps))


@pytest.mark.parametrize("null", ["encoded", "zeros"])
def test_dropped_text(null):
    """It becomes the empty text's embedding, or zeros."""
    config, rng = cascade(null_text=null), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype),
        nn.abstract(config.unets[0])[1],
    )
    imagen = Imagen(config, unets=[nn.bind(config.unets[0], params)])
    images, key = rng.uniform(size=(2, 8, 8, 3)).astype(np.float32), jax.random.key(3)
    dropped = Draws(keep_mask=np.array([False, False]))
    lost = imagen.loss(images, key=key, draws=dropped, texts=["a red apple", "a pear"])
    same = imagen.loss(images, key=key, draws=dropped, texts=["a boat", "a very old tree"])
    np.testing.assert_array_equal(lost, same)
    embeds = np.zeros((2, 12, 128), np.float32)
    if null == "encoded":
        embeds = np.repeat(text.cascade_encoder(config)([""], length=12)[0], 2, axis=0)
    kept = Draws(keep_mask=np.array([True, True]))
    given = dict(text_embeds=embeds, text_masks=np.ones((2, 12), bool))
    absent = dict(null_text_embeds=embeds if null == "encoded" else None)
    again = imagen.loss(images, key=key, draws=kept, **given, **absent)
    np.testing.assert_allclose(again, lost, rtol=1e-5)
    again = imagen.loss(images, key=key, draws=dropped, **given, **absent)
    np.testing.assert_allclose(again, lost, rtol=1e-5)
    if null == "encoded":
        with pytest.raises(
            UserError, match="missing text is encoded as the empty caption: .* null_text_embeds"
        ):
            imagen.loss(images, key=key, draws=dropped, **given)


@pytest.mark.long
def test_a_small_one_learns(tmp_path, monkeypatch):
    """By `train.base`, with a learned variance and the empty text for none."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(cascade(null_text="encoded").to_dict()))
    run = tmp_path / "run"
    arguments = dict(
        config=path, workdir=run, data="bundled", steps=120, batch_size=16, lr=3e-3, log_every=20,
        eval_every=60, sample_every=120, sample_steps=8, save_every=120, warmup_steps=10,
    )  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    monkeypatch.setattr("sys.argv", ["", *flags])
    base.main()
    lines = metrics(run)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert len([*(run / "samples").iterdir()]) == 1
    assert run_config.read(run).unets[0].null_text == "encoded"


def test_a_set_of_embeddings_lacks_that_of_the_empty_text(tmp_path):
    """A cascade that drops text in favour of it is refused; one that never drops reads the set."""
    recorded = text.Identity(name="t5", sha256="a" * 64)
    recorded.write(tmp_path)
    drops = cascade(null_text="encoded")
    with pytest.raises(UserError, match="a set contains embeddings: dropping text .* empty text"):
        text.stored_encoder(drops, "a set", [tmp_path])
    never = dataclasses.replace(drops, cond_drop_prob=0.0)
    assert text.stored_encoder(never, "a set", [tmp_path]) == recorded
