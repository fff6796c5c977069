"""The loop against the reference's, with its draws given; closed forms; slices and compilations."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from imagen_jax.diffusion import guidance, process, samplers
from imagen_jax.diffusion.samplers import Carry, Inpaint, make_grid, run_slice

SHAPE = (2, 6, 6, 3)
RNG = np.random.default_rng(0)
KNOWN = RNG.uniform(size=SHAPE).astype(np.float32)
MASK = RNG.uniform(size=(2, 6, 6, 1)) < 0.5


def network(x, level, previous, xp, axis):
    """Any function of all it is told; mixes the channels."""
    mixed = xp.tanh(x) + 0.3 * xp.roll(x, 1, axis) + 0.1 * xp.sin(level / 3)
    return mixed if previous is None else mixed - 0.4 * previous


def denoise(x_t, log_snr, x0_previous=None):
    return network(x_t, log_snr[:, None, None, None], x0_previous, jnp, -1)


class Network:
    """The same for the reference."""

    def __init__(self, self_cond):
        self.self_cond = self_cond

    def forward_with_cond_scale(self, x, level, *, self_cond=None, **_):
        if self.self_cond and self_cond is None:
            self_cond = torch.zeros_like(x)
        return network(x, level[:, None, None, None], self_cond, torch, 1)


def channels_first(a):
    return torch.from_numpy(np.moveaxis(a, -1, 1).copy())


@pytest.fixture(scope="module")
def imagen(reference):
    unet = reference.Unet(dim=8, dim_mults=(1,), attn_heads=2, cond_on_text=False)
    return reference.Imagen(unet, image_sizes=6, condition_on_text=False)


def reference_sample(reference, imagen, noises, *, steps, schedule, **arguments):
    """`Imagen.p_sample_loop` fed with `noises`, which it has to use up; in [0, 1]."""
    given = iter(channels_first(noise) for noise in noises)
    scheduler = reference.GaussianDiffusionContinuousTimes(noise_schedule=schedule, timesteps=steps)
    draw = lambda *_, **__: next(given)  # noqa: E731
    with mock.patch.object(torch, "randn", draw), mock.patch.object(torch, "randn_like", draw):
        out = imagen.p_sample_loop(
            shape=(2, 3, 6, 6), noise_scheduler=scheduler, use_tqdm=False, **arguments
        )
    assert next(given, None) is None
    return np.moveaxis(out.numpy(), 1, -1)


@functools.partial(
    jax.jit, static_argnames=("objective", "self_cond", "variance", "sampler", "denoise")
)
def run(carry, grid, start, stop, *, eta=0.0, sampler="ancestral", denoise=denoise, **arguments):
    step = {
        "ancestral": samplers.ancestral,
        "ddim": functools.partial(samplers.ddim, eta=eta),
    }[sampler]
    return run_slice(denoise, carry, grid, start, stop, step=step, **arguments)


def begin(noise):
    return Carry(jnp.asarray(noise), jnp.zeros_like(noise))


CASES = {
    "noise": dict(objective="noise", steps=12),
    "v, linear, static": dict(objective="v", steps=12, schedule="linear", dynamic=False),
    "x_start, self-conditioned": dict(objective="x_start", steps=7, self_cond=True),
    "skipping": dict(objective="v", steps=12, skip_steps=5),
    "one step": dict(objective="v", steps=1),
    "inpainting": dict(objective="v", steps=5, resample_times=3),
    "inpainting once": dict(objective="noise", steps=4, resample_times=1, self_cond=True),
    "inpainting late": dict(objective="x_start", steps=4, resample_times=2, skip_steps=2),
}


@pytest.mark.parametrize("name", CASES)
def test_loop_matches_reference(reference, imagen, name):
    case = {
        "schedule": "cosine",
        "dynamic": True,
        "self_cond": False,
        "skip_steps": 0,
        "resample_times": None,
        **CASES[name],
    }
    steps, resample_times = case["steps"], case["resample_times"]
    count = samplers.count_noises(steps - case["skip_steps"], resample_times=resample_times)
    noises = np.random.default_rng(1).normal(size=(1 + count, *SHAPE)).astype(np.float32)
    inpaint, known = None, {}
    if resample_times:
        inpaint = Inpaint(jnp.asarray(2 * KNOWN - 1), jnp.asarray(MASK), resample_times)
        known = dict(
            inpaint_images=channels_first(KNOWN),
            inpaint_masks=torch.from_numpy(MASK[..., 0]),
            inpaint_resample_times=resample_times,
        )
    want = reference_sample(
        reference,
        imagen,
        noises,
        steps=steps,
        schedule=case["schedule"],
        unet=Network(case["self_cond"]),
        pred_objective=case["objective"],
        dynamic_threshold=case["dynamic"],
        skip_steps=case["skip_steps"],
        **known,
    )
    grid = make_grid(steps, case["schedule"], skip_steps=case["skip_steps"])
    got = run(
        begin(noises[0]),
        grid,
        0,
        grid.num_steps,
        objective=case["objective"],
        percentile=0.95 if case["dynamic"] else None,
        self_cond=case["self_cond"],
        inpaint=inpaint,
        variance="reference",
        noises=jnp.asarray(noises[1:]),
    )
    got = (samplers.finish(got.x, inpaint) + 1) / 2
    np.testing.assert_allclose(got, want, atol=1e-4)
    if inpaint is not None:
        np.testing.assert_allclose(np.where(MASK, got - KNOWN, 0.0), 0.0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_reaches_the_only_picture(sampler):
    """If the data are one picture, its denoiser leads there from any noise."""
    picture = jnp.tanh(jax.random.normal(jax.random.key(1), SHAPE[1:]))

    def only(x_t, log_snr):
        return jnp.broadcast_to(picture, x_t.shape)

    carry = begin(jax.random.normal(jax.random.key(2), SHAPE))
    got = run(
        carry,
        make_grid(20, "cosine"),
        0,
        20,
        objective="x_start",
        key=jax.random.key(3),
        sampler=sampler,
        denoise=only,
    )
    atol = {"ancestral": 1e-2, "ddim": 0.0}[sampler]
    np.testing.assert_allclose(got.x, jnp.broadcast_to(picture, SHAPE), atol=atol)


VARIANCE = 0.04


def gaussian(x_t, log_snr):
    """E[x_0 | x_t] for x_0 ~ N(0, VARIANCE)."""
    alpha2, sigma2 = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
    gain = jnp.sqrt(alpha2) * VARIANCE / (alpha2 * VARIANCE + sigma2)
    return gain[:, None, None, None] * x_t


def recursion(steps):
    """Variance that `ancestral` arrives at on Gaussian data, in float64: V' = k^2 V + std^2."""
    level = make_grid(steps, "linear").log_snr[: steps + 1].astype(np.float64)
    a, s = (1 / (1 + np.exp(-level))) ** 0.5, (1 / (1 + np.exp(level))) ** 0.5
    c = -np.expm1(level[:-1] - level[1:])
    gain = a * VARIANCE / (a**2 * VARIANCE + s**2)
    k = a[1:] * ((1 - c) / a[:-1] + c * gain[:-1])
    added = s[1:] ** 2 * c
    added[-1] = 0.0
    variance = 1.0
    for i in range(steps):
        variance = k[i] ** 2 * variance + added[i]
    return variance


def test_ancestral_has_the_variance_of_gaussian_data():
    """Of its linear recursion at any number of steps, of the data themselves at many."""
    np.testing.assert_allclose(recursion(4000), VARIANCE, rtol=0.02)
    carry = begin(jax.random.normal(jax.random.key(0), (64, 32, 32, 1)))
    grid, key = make_grid(30, "linear"), jax.random.key(1)
    got = run(carry, grid, 0, 30, objective="x_start", key=key, denoise=gaussian)
    np.testing.assert_allclose(np.var(got.x), recursion(30), rtol=0.03)  # 65,536 draws: 0.6 %


def test_ddim_follows_the_flow_of_gaussian_data():
    """The probability flow scales the noise by the data's standard deviation."""
    noise = jax.random.normal(jax.random.key(0), SHAPE)
    noise = jnp.clip(noise, -2.5, 2.5)
    got = run(
        begin(noise),
        make_grid(1000, "cosine"),
        0,
        1000,
        objective="x_start",
        key=jax.random.key(1),
        sampler="ddim",
        denoise=gaussian,
    )
    np.testing.assert_allclose(got.x, VARIANCE**0.5 * noise, atol=0.01)


def test_ddim_with_eta_one_is_ancestral():
    x, x0, noise = jax.random.normal(jax.random.key(0), (3, 4, 5, 5, 3))
    now, then = jnp.array([-6.0, -1.0, 1.0, 5.0]), jnp.array([-4.0, 0.5, 6.0, 5.5])
    want = samplers.ancestral(x, x0, now, then, noise, last=False)
    got = samplers.ddim(x, x0, now, then, noise, last=False, eta=1.0)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_last_step_adds_no_noise():
    x, x0, noise = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    now, then = jnp.array([3.0, 3.0]), jnp.array([8.0, 8.0])
    for step in (samplers.ancestral, functools.partial(samplers.ddim, eta=1.0)):
        a, b = (step(x, x0, now, then, n, last=True) for n in (noise, -noise))
        np.testing.assert_array_equal(a, b)


EQUIVALENCE = dict(objective="v", percentile=0.9, self_cond=True)


def by_hand(carry, grid, key):
    """The loop as a loop, from public functions."""
    x, x0 = carry
    for i in range(3):
        now, then = (jnp.full(SHAPE[:1], grid.log_snr[j]) for j in (i, i + 1))
        noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), 1), SHAPE)
        x0 = process.predict_x0(x, denoise(x, now, x0), now, "v")
        x0 = guidance.dynamic_threshold(x0, 0.9)
        x = samplers.ancestral(x, x0, now, then, noise, last=i == 2)
    return Carry(x, x0)


def test_whole_is_sliced_is_eager_is_a_python_loop():
    key, grid = jax.random.key(5), make_grid(3, "cosine")
    first = begin(jax.random.normal(jax.random.key(4), SHAPE))
    whole = run(first, grid, 0, 3, key=key, **EQUIVALENCE)
    sliced = first
    for start, stop in ((0, 1), (1, 1), (1, 3)):
        sliced = run(sliced, grid, start, stop, key=key, **EQUIVALENCE)
    eager = run_slice(denoise, first, grid, 0, 3, key=key, **EQUIVALENCE)
    jax.tree.map(np.testing.assert_array_equal, sliced, whole)
    for other in (eager, by_hand(first, grid, key)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), other, whole)


def test_nothing_that_changes_between_runs_recompiles():
    """Steps, bounds, seed, percentile, eta and resampling are all data."""
    inpaint = Inpaint(jnp.asarray(2 * KNOWN - 1), jnp.asarray(MASK), 2)
    first = begin(jax.random.normal(jax.random.key(4), SHAPE))
    before = run._cache_size()
    results = [
        run(
            first, make_grid(steps, schedule, skip_steps=skip), start, stop, objective="v",
            key=jax.random.key(seed), percentile=percentile, eta=eta, sampler="ddim",
            inpaint=inpaint._replace(resample_times=times),
        ).x
        for steps, schedule, skip, start, stop, seed, percentile, eta, times in (
            (4, "cosine", 0, 0, 4, 0, 0.95, 0.0, 2),
            (9, "linear", 2, 1, 3, 1, 0.5, 0.7, 1),
            (1024, "cosine", 1000, 20, 24, 2, 1.0, 1.0, 3),
        )
    ]  # fmt: skip
    assert run._cache_size() == before + 1
    assert all(np.isfinite(result).all() for result in results)


def test_bfloat16_network():
    def coarse(x_t, log_snr):
        return denoise(x_t, log_snr).astype(jnp.bfloat16)

    first = begin(jax.random.normal(jax.random.key(4), SHAPE))
    out = run(
        first,
        make_grid(2, "cosine"),
        0,
        2,
        objective="x_start",
        key=jax.random.key(0),
        denoise=coarse,
    )
    assert out.x.dtype == out.x0.dtype == jnp.float32


@pytest.mark.parametrize("given", [{}, {"key": 1, "noises": 1}])
def test_one_source_of_noise(given):
    given = {name: jax.random.key(0) if name == "key" else jnp.zeros((1, *SHAPE)) for name in given}
    with pytest.raises(ValueError, match="not both"):
        run_slice(
            denoise, begin(jnp.zeros(SHAPE)), make_grid(1, "cosine"), 0, 1, objective="v", **given
        )
