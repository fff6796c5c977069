"""DPM-Solver++: orders of convergence, trajectories of diffusers, and what its memory survives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from imagen_jax.diffusion import grids, samplers
from imagen_jax.diffusion.edm import EDM
from imagen_jax.diffusion.process import eps_from_x0
from imagen_jax.diffusion.samplers import SAMPLERS, Grid, Inpaint, make_grid, run_slice
from imagen_jax.diffusion.vp import VP
from tests.diffusion.test_samplers import drawn, mixture

V, X_START = VP(objective="v"), VP(objective="x_start")
SHAPE = (2, 4, 4, 3)
NOISE = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def at_log_snr_6(sampler: str, steps: int) -> np.ndarray:
    """x of the mixture's probability flow at log-SNR 6, from -6, in float64."""
    with jax.enable_x64(True):
        positions = np.append(np.linspace(-6.0, 6.0, steps + 1), 7.0)
        grid = Grid(positions, np.int32(steps + 1), np.int32(steps + 1))
        noise = jax.scipy.stats.norm.ppf((jnp.arange(33) + 0.5) / 33)[:, None]

        def answer(x, level):
            x0 = mixture(x, level)
            return V.target(x0, eps_from_x0(x, x0, level), level)

        found = run_slice(
            answer, V, samplers.start(SAMPLERS[sampler], noise), grid, 0, steps,
            sampler=SAMPLERS[sampler], noise=lambda *_: noise, percentile=1.0,
        )  # fmt: skip
        return np.asarray(found.x)


@functools.cache
def limit() -> np.ndarray:
    return at_log_snr_6("dpm++3m", 2048)


ORDERS = {"ddim": 1, "heun": 2, "dpm++2m": 2, "dpm++3m": 3}


@pytest.mark.parametrize("sampler", ORDERS)
def test_the_order_of_convergence(sampler):
    errors = [np.abs(at_log_snr_6(sampler, steps) - limit()).max() for steps in (64, 128)]
    assert ORDERS[sampler] - 0.1 < np.log2(errors[0] / errors[1]) < ORDERS[sampler] + 0.25


@pytest.mark.parametrize(
    ("sampler", "algorithm"), [("dpm++2m", "dpmsolver++"), ("dpm++2m-sde", "sde-dpmsolver++")]
)
def test_trajectories_are_those_of_diffusers(sampler, algorithm):
    """On the same levels, with the same noises and the same answers of the network."""
    grid = make_grid(X_START, 8, spacing="karras", multiple=8)
    noises = np.random.default_rng(1).normal(size=(8, *SHAPE)).astype(np.float32)

    def answer(x, level):
        return jnp.tanh(x) + 0.1 * jnp.sin(level.log_snr)[:, None, None, None]

    run = functools.partial(
        run_slice, answer, X_START, grid=grid, sampler=SAMPLERS[sampler], percentile=None,
        noise=lambda i, r, which: jnp.asarray(noises)[i],
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type=algorithm, prediction_type="sample", solver_order=2
    )
    # What its `set_timesteps` sets, for levels of our own.
    scheduler.num_inference_steps, scheduler.timesteps = 8, torch.arange(8).flip(0)
    scheduler.sigmas = torch.from_numpy(np.exp(-grid.positions.astype(np.float64) / 2))
    state = samplers.start(SAMPLERS[sampler], jnp.asarray(NOISE))
    theirs = torch.from_numpy(NOISE.copy()).double()
    for i in range(7):  # ours ends with the estimate of x_0
        log_snr = torch.tensor(float(grid.positions[i]))
        x0 = torch.clamp(torch.tanh(theirs) + 0.1 * torch.sin(log_snr), -1, 1)
        step = scheduler.step(
            x0, scheduler.timesteps[i], theirs, variance_noise=torch.from_numpy(noises[i])
        )
        theirs = step.prev_sample.double()
        state = run(state, first=i, stop=i + 1)
        np.testing.assert_allclose(state.x, theirs, atol=1e-5)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "dpm" in name])
@pytest.mark.parametrize("objective", ["noise", "v"])
def test_the_end_of_the_cosine_where_alpha_vanishes(sampler, objective):
    """alpha is 4e-8 at the first level: nothing overflows, and a picture alone is reached."""
    process = VP(objective=objective)
    picture = np.tanh(np.random.default_rng(2).normal(size=SHAPE[1:])).astype(np.float32)

    def answer(x, level):
        x0 = jnp.broadcast_to(picture, x.shape)
        return process.target(x0, eps_from_x0(x, x0, level), level)

    found = run_slice(
        answer, process, samplers.start(SAMPLERS[sampler], jnp.asarray(NOISE)),
        make_grid(process, 12), 0, 12, sampler=SAMPLERS[sampler],
        noise=functools.partial(drawn, jax.random.key(0), SHAPE), percentile=0.95,
    )  # fmt: skip
    np.testing.assert_allclose(found.x, np.broadcast_to(picture, SHAPE), atol=1e-4)


def test_memory_crosses_slices_and_survives_going_back():
    """Slices change nothing; RePaint, which comes back to a level, starts from what was before it:
    with nothing known and one passage it is the plain loop."""
    grid, sampler = make_grid(V, 6), SAMPLERS["dpm++3m"]

    def answer(x, level):
        return jnp.tanh(x + 0.1 * level.log_snr[:, None, None, None])

    run = functools.partial(
        run_slice, answer, V, grid=grid, sampler=sampler, percentile=0.9,
        noise=functools.partial(drawn, jax.random.key(0), SHAPE),
    )  # fmt: skip
    begin = samplers.start(sampler, jnp.asarray(NOISE))
    complete = run(begin, first=0, stop=6)
    sliced = run(run(begin, first=0, stop=2), first=2, stop=6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), sliced, complete)
    nothing = Inpaint(jnp.asarray(NOISE), jnp.zeros((2, 4, 4, 1), bool), 1)
    alone = run(begin, first=0, stop=6, inpaint=nothing)
    np.testing.assert_allclose(alone.x, complete.x, atol=1e-6)
    again = run(begin, first=0, stop=4, inpaint=nothing._replace(resample_times=3))
    assert np.isfinite(again.x).all()
    levels = -0.5 * (again.memory.lambda_newer - again.memory.lambda_older)
    np.testing.assert_allclose(levels, (grid.positions[2] - grid.positions[3]) / 4, rtol=1e-5)


@pytest.mark.parametrize("process", [V, VP(schedule="linear"), EDM()])
@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
def test_spacings(process, spacing):
    points = process.grid(10, spacing=spacing)
    levels = process.level(jnp.asarray(points[:10]))
    coordinate = np.asarray(levels.log_snr, np.float64)
    if spacing == "karras":
        coordinate = np.exp(-coordinate / 2) ** (1 / grids.RHO)
    np.testing.assert_allclose(np.diff(coordinate), np.diff(coordinate)[0], rtol=1e-3)
    assert len(points) == 11 and np.all(np.diff(np.asarray(levels.log_snr)) > 0)


@pytest.mark.parametrize(
    ("process", "spacing", "message"),
    [
        (V, "cosine", "spacing 'cosine' is not one of t, log_snr, karras"),
        (V, (1.0, 0.5), "has 2 levels where 4 are needed"),
        (V, (1.0, 0.5, 0.5, 0.1), "must be decreasing and above 0"),
        (EDM(), "t", "elucidated cascades have no time"),
    ],
)
def test_mistaken_spacings(process, spacing, message):
    with pytest.raises(ValueError, match=message):
        process.grid(3, spacing=spacing)


def test_a_list_of_levels():
    ratios = (80.0, 5.0, 0.5, 0.01)
    np.testing.assert_allclose(np.exp(-V.grid(3, spacing=ratios) / 2), ratios, rtol=1e-6)
    np.testing.assert_allclose(EDM().grid(4, spacing=ratios), [*ratios, 0.0], rtol=1e-6)
