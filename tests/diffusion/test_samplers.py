"""The loop against the reference's, with its draws given; closed forms; slices and compilations."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from imagen_jax.diffusion import guidance, samplers
from imagen_jax.diffusion.edm import EDM
from imagen_jax.diffusion.process import Prediction, eps_from_x0
from imagen_jax.diffusion.samplers import (
    SAMPLERS,
    Inpaint,
    Options,
    State,
    Step,
    make_grid,
    run_slice,
)
from imagen_jax.diffusion.vp import VP
from tests import OPTIMISED

SHAPE = (2, 6, 6, 3)
X_START = VP(objective="x_start")
LINEAR = VP(objective="x_start", schedule="linear")
RNG = np.random.default_rng(0)
KNOWN = RNG.uniform(size=SHAPE).astype(np.float32)
MASK = RNG.uniform(size=(2, 6, 6, 1)) < 0.5


def network(x, level, previous, xp, axis):
    """Any function of all it is told; mixes the channels."""
    mixed = xp.tanh(x) + 0.3 * xp.roll(x, 1, axis) + 0.1 * xp.sin(level / 3)
    return mixed if previous is None else mixed - 0.4 * previous


def denoise(x, level, x0_previous=None):
    return network(x, level.conditioning[:, None, None, None], x0_previous, jnp, -1)


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
    jax.jit,
    static_argnames=("process", "self_cond", "variance", "sampler", "denoise"),
)
def run(
    state, grid, start, stop, *, process=X_START, sampler="ancestral", eta=0.0, key=None,
    noises=None, denoise=denoise, inpaint=None, **arguments,
):  # fmt: skip
    """The loop with one key for the batch, or with given noises."""
    times = None if inpaint is None else inpaint.resample_times
    if noises is None:
        noise = functools.partial(drawn, key, state.x.shape)
    else:
        noise = samplers.given_noises(noises, grid, times)
    return run_slice(
        denoise, process, state, grid, start, stop, sampler=SAMPLERS[sampler], noise=noise,
        options=Options(eta=eta), inpaint=inpaint, **arguments,
    )  # fmt: skip


def drawn(key, shape, i, r, which):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), 3 * r + which), shape)


def begin(noise):
    return samplers.start(SAMPLERS["ancestral"], jnp.asarray(noise))


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
    process = VP(objective=case["objective"], schedule=case["schedule"])
    grid = make_grid(process, steps, skip_steps=case["skip_steps"])
    got = run(
        begin(noises[0]),
        grid,
        0,
        grid.num_steps,
        process=process,
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

    def only(x_t, level):
        return jnp.broadcast_to(picture, x_t.shape)

    carry = begin(jax.random.normal(jax.random.key(2), SHAPE))
    got = run(
        carry,
        make_grid(X_START, 20),
        0,
        20,
        process=X_START,
        key=jax.random.key(3),
        sampler=sampler,
        denoise=only,
    )
    atol = {"ancestral": 1e-2, "ddim": 0.0}[sampler]
    np.testing.assert_allclose(got.x, jnp.broadcast_to(picture, SHAPE), atol=atol)


VARIANCE = 0.04


def gaussian(x_t, level):
    """E[x_0 | x_t] for x_0 ~ N(0, VARIANCE)."""
    gain = level.alpha * VARIANCE / (level.alpha**2 * VARIANCE + level.sigma**2)
    return gain[:, None, None, None] * x_t


def recursion(steps):
    """Variance that `ancestral` arrives at on Gaussian data, in float64: V' = k^2 V + std^2."""
    level = make_grid(LINEAR, steps).positions[: steps + 1].astype(np.float64)
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
    grid, key = make_grid(LINEAR, 30), jax.random.key(1)
    got = run(carry, grid, 0, 30, process=LINEAR, key=key, denoise=gaussian)
    np.testing.assert_allclose(np.var(got.x), recursion(30), rtol=0.03)  # 65,536 draws: 0.6 %


def test_ddim_follows_the_flow_of_gaussian_data():
    """The probability flow scales the noise by the data's standard deviation."""
    noise = jax.random.normal(jax.random.key(0), SHAPE)
    noise = jnp.clip(noise, -2.5, 2.5)
    got = run(
        begin(noise),
        make_grid(X_START, 1000),
        0,
        1000,
        process=X_START,
        key=jax.random.key(1),
        sampler="ddim",
        denoise=gaussian,
    )
    np.testing.assert_allclose(got.x, VARIANCE**0.5 * noise, atol=0.01)


def one_step(sampler, x, x0, levels, noise, *, last=False, eta=0.0):
    now, then = (VP().level(jnp.array(level)) for level in levels)

    def estimate(x, level, previous):
        return Prediction(x0, eps_from_x0(x, x0, level))

    step = Step(VP(), now, then, noise, jnp.array(last), 10, Options(eta=eta))
    state = State(x, x0, SAMPLERS[sampler].memory(x))
    return SAMPLERS[sampler].step(state, estimate, step).x


def test_ddim_with_eta_one_is_ancestral():
    x, x0, noise = jax.random.normal(jax.random.key(0), (3, 4, 5, 5, 3))
    levels = [-6.0, -1.0, 1.0, 5.0], [-4.0, 0.5, 6.0, 5.5]
    want = one_step("ancestral", x, x0, levels, noise)
    np.testing.assert_allclose(one_step("ddim", x, x0, levels, noise, eta=1.0), want, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_last_step_adds_no_noise(sampler):
    x, x0, noise = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    levels = [3.0, 3.0], [8.0, 8.0]
    a, b = (one_step(sampler, x, x0, levels, n, last=True, eta=1.0) for n in (noise, -noise))
    np.testing.assert_array_equal(a, b)


def test_unknown_samplers_are_refused():
    with pytest.raises(ValueError, match="'dimm' is not one of ancestral, ddim.*mean 'ddim'"):
        samplers.find_sampler("dimm")


V = VP(objective="v")
EQUIVALENCE = dict(process=V, percentile=0.9, self_cond=True)


def by_hand(state, grid, key):
    """The loop as a loop, from public functions."""
    x, x0, _ = state
    for i in range(3):
        now, then = (V.level(jnp.full(SHAPE[:1], grid.positions[j])) for j in (i, i + 1))
        previous = x0

        def estimate(x, level, _, previous=previous):
            found = V.predict(lambda x, level: denoise(x, level, previous), x, level)
            return guidance.threshold(found, x, level, 0.9)

        noise = drawn(key, SHAPE, i, 0, 1)
        step = Step(V, now, then, noise, jnp.array(i == 2), 3, Options())
        x, x0, _ = samplers.ancestral(State(x, x0), estimate, step)
    return State(x, x0)


def test_complete_is_sliced_is_eager_is_a_python_loop():
    key, grid = jax.random.key(5), make_grid(V, 3)
    first = begin(jax.random.normal(jax.random.key(4), SHAPE))
    complete = run(first, grid, 0, 3, key=key, **EQUIVALENCE)
    sliced = first
    for start, stop in ((0, 1), (1, 1), (1, 3)):
        sliced = run(sliced, grid, start, stop, key=key, **EQUIVALENCE)
    eager = run.__wrapped__(first, grid, 0, 3, key=key, **EQUIVALENCE)
    jax.tree.map(np.testing.assert_array_equal, sliced, complete)
    for other in (eager, by_hand(first, grid, key)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), other, complete)


def test_nothing_that_changes_between_runs_recompiles():
    """Steps, bounds, seed, percentile, eta and resampling are all data."""
    inpaint = Inpaint(jnp.asarray(2 * KNOWN - 1), jnp.asarray(MASK), 2)
    first = begin(jax.random.normal(jax.random.key(4), SHAPE))
    before = run._cache_size()
    results = [
        run(
            first, make_grid(VP(schedule=schedule), steps, skip_steps=skip), start, stop, process=V,
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
    def coarse(x, level):
        return denoise(x, level).astype(jnp.bfloat16)

    first = begin(jax.random.normal(jax.random.key(4), SHAPE))
    out = run(
        first,
        make_grid(X_START, 2),
        0,
        2,
        process=X_START,
        key=jax.random.key(0),
        denoise=coarse,
    )
    assert out.x.dtype == out.x0.dtype == jnp.float32


# ---- the limit of many steps


WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-0.6, 0.4]), np.array([0.15, 0.25])


def mixture(x, level):
    """E[x_0 | x] where x_0 is a mixture of two Gaussians on a line."""
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    means, variances = alpha * MEANS, alpha**2 * STDS**2 + sigma**2
    log_p = jnp.log(WEIGHTS) - 0.5 * jnp.log(variances) - 0.5 * (x - means) ** 2 / variances
    gains = alpha * STDS**2 / variances
    return jnp.sum(jax.nn.softmax(log_p, axis=1) * (MEANS + gains * (x - means)), 1, keepdims=True)


def quantile_of_data(u):
    """The inverse of the mixture's distribution function."""
    line = np.linspace(-3, 3, 600_001)
    density = sum(
        w * np.exp(-0.5 * ((line - m) / s) ** 2) / s
        for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True)
    )
    below = np.cumsum(density)
    return np.interp(u, below / below[-1], line)


def sample_mixture(process, sampler, steps, count, key=0, **options):
    """x at the end, from evenly spaced quantiles of the prior, in float64."""
    with jax.enable_x64(True):
        u = (np.arange(count) + 0.5) / count
        grid = make_grid(process, steps, multiple=steps)
        level = process.level(jnp.full((count,), grid.positions[0]))
        noise = jax.scipy.stats.norm.ppf(jnp.asarray(u))[:, None]
        state = samplers.start(SAMPLERS[sampler], process.prior(noise, level))

        def answer(x, level):
            if isinstance(process, EDM):  # the network sees c_in x
                x = x * jnp.sqrt(level.sigma**2 + process.sigma_data**2)[:, None]
            x0 = mixture(x, level)
            return process.target(x0, eps_from_x0(x, x0, level), level)

        @functools.partial(jax.jit, compiler_options=OPTIMISED)
        def loop(state):
            return run_slice(
                answer,
                process,
                state,
                grid,
                0,
                steps,
                sampler=SAMPLERS[sampler],
                noise=functools.partial(drawn, jax.random.key(key), noise.shape),
                options=Options(**options),
                percentile=1.0,
            )

        state = loop(state)
        return u, np.asarray(state.x)[:, 0]


LIMITS = {"v": V, "noise, linear": VP(schedule="linear"), "x_start": X_START, "edm": EDM()}
CHURN = dict(S_churn=40.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.003)
DETERMINISTIC = {"ddim": {}, "heun": {}, "dpm++2m": {}, "dpm++3m": {}}
STOCHASTIC = {"ancestral": {}, "ddim": dict(eta=0.7), "heun": CHURN, "dpm++2m-sde": {}}


@pytest.mark.parametrize("process", LIMITS)
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_the_flow_maps_quantiles_to_quantiles(process, sampler):
    """The probability flow on a line keeps the order, so its limit is known exactly."""
    u, x = sample_mixture(LIMITS[process], sampler, 2000, 99, **DETERMINISTIC[sampler])
    np.testing.assert_allclose(x, np.clip(quantile_of_data(u), -1, 1), atol=5e-3)


@pytest.mark.parametrize("process", LIMITS)
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_samplers_have_the_distribution_of_the_data(process, sampler):
    """Kolmogorov-Smirnov: 20,000 samples stay within 1.2 % (1 % level) of the data's."""
    _, x = sample_mixture(LIMITS[process], sampler, 300, 20_000, **STOCHASTIC[sampler])
    quantiles = quantile_of_data(np.array([0.1, 0.25, 0.5, 0.75, 0.9]))
    below = (x[:, None] < quantiles).mean(0)
    np.testing.assert_allclose(below, [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.012)
