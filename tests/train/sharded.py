"""One optimiser step through the real jitted train step, on a mesh, and what it did to every leaf.

The optimiser is wrapped so that the state keeps the gradients. Its eps is large: at 1e-8 leaves
whose true gradient is zero move by rounding noise.
"""

import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import optax

from imagen_jax import sharding
from imagen_jax.config import DiscreteConfig, ImagenConfig, UnetConfig
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.sharding import make_layout
from train import step
from train.optimizer import make_optimizer
from train.settings import Optimization, Settings
from train.state import TrainState

MESHES = ("8x1", "4x2", "2x4", "1x8")
BATCH, WIDTH, LENGTH = 16, 12, 6
SIZE = 8  # pixels; of super-resolution as many as make a map be split by rows, not by channels

# Four heads split over 2 and 4 devices, not over 8; the middle's cross-attention has always 8.
_SHARED = dict(
    dim=16,
    cond_dim=16,
    attn_dim_head=8,
    attn_heads=4,
    max_text_len=8,
    attn_pool_num_latents=4,
    attend_at_middle=False,
    init_cross_embed=False,
    init_conv_kernel_size=3,
)
NETWORKS = {
    "base": UnetConfig(
        **_SHARED | dict(use_global_context_attn=False),
        dim_mults=(1, 2),
        layer_attns=True,
        layer_cross_attns=(False, True),
    ),
    "small": UnetConfig(
        **_SHARED | dict(attn_pool_text=False),
        dim_mults=(1,),
        layer_cross_attns=False,
        use_linear_attn=True,
        layer_attns=False,
        pixel_shuffle_upsample=False,
    ),
    "super_res": UnetConfig(
        **_SHARED | dict(attn_pool_text=False, init_cross_embed=True),
        init_cross_embed_kernel_sizes=(3, 5),
        dim_mults=(1,),
        layer_attns=False,
        layer_cross_attns=False,
        memory_efficient=True,
    ),
    "if": IFUnetConfig(
        dim=64,  # two channels a group: with one, the norms cancel what a bias adds
        dim_mults=(1, 2),
        num_resnet_blocks=1,
        layer_attns=(False, True),
        attn_dim_head=16,
        pool_heads=4,
        max_text_len=LENGTH,
    ),
}


def cascade(network: str) -> tuple[ImagenConfig, int]:
    """A cascade and which U-Net of it to train."""
    if network == "if":
        config = ImagenConfig(
            unets=NETWORKS["if"],
            image_sizes=SIZE,
            text_encoder_name="none",
            text_embed_dim=WIDTH,
            discrete=DiscreteConfig(),
        )
        return config, 1
    unets = (NETWORKS["small" if network == "super_res" else network], NETWORKS["super_res"])
    config = ImagenConfig(
        unets=unets,
        image_sizes=(SIZE, sharding.ROWS_FROM),
        text_encoder_name="none",
        text_embed_dim=WIDTH,
        pred_objectives="v",
    )
    return config, 2 if network == "super_res" else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    mesh: str
    network: str = "base"
    optimizer: str = "adam"
    accumulate: int = 1
    remat: str | None = None

    @property
    def unsharded(self) -> "Case":
        """What it must equal: all at once, nothing recomputed, on one device. Where linear
        attention drops out inputs, each part of a batch has draws of its own."""
        parts = self.accumulate if self.network == "small" else 1
        return dataclasses.replace(self, mesh="1x1", accumulate=parts, remat=None)

    def __str__(self) -> str:
        parts = f"x{self.accumulate}" if self.accumulate > 1 else ""
        remat = "-remat" if self.remat else ""
        return f"{self.mesh}-{self.network}-{self.optimizer}{parts}{remat}"


def _remembering(settings) -> optax.GradientTransformation:
    """The optimiser, with the last gradients in its state."""
    optimizer = make_optimizer(settings)
    if settings.optimizer == "adafactor":  # moments of these small kernels are factored too
        optimizer = optax.adafactor(
            settings.lr, multiply_by_parameter_scale=False, min_dim_size_to_factor=8, eps=1e-6
        )
    gradients = optax.GradientTransformation(
        lambda params: jax.tree.map(jax.numpy.zeros_like, params), lambda g, _, params: (g, g)
    )
    return optax.chain(gradients, optimizer)


@functools.cache
def outcome(case: Case) -> dict[str, dict[str, np.ndarray]]:
    """Gradients, parameters and their average after one step, leaf by leaf; the loss."""
    settings = Settings(
        optimizer=case.optimizer,
        accumulate=case.accumulate,
        remat=case.remat,
        batch_size=BATCH,
        lr=2e-4,
        eps=1e-3,
        max_grad_norm=None,
        ema="plain",
        dtype="float32",
    )
    config, unet_number = cascade(case.network)
    layout = make_layout(case.mesh, rows=settings.rows, min_size=0)
    optimizer, rng = _remembering(settings), np.random.default_rng(0)
    shapes = TrainState.shapes(config.unets[unet_number - 1], optimizer)
    params = jax.tree.map(
        lambda x: (0.1 * rng.standard_normal(x.shape)).astype(x.dtype), shapes.params
    )
    batch = dict(
        images=rng.integers(0, 256, (BATCH, *config.stage(unet_number).sample_shape), np.uint8),
        text_embeds=rng.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32),
        text_masks=np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (BATCH, 1)),
    )
    create = jax.jit(lambda p: TrainState.create(p, optimizer), out_shardings=layout.place(shapes))
    with mock.patch.object(step, "make_optimizer", _remembering):
        step._train_step.cache_clear()
        train_step = step.make_train_step(
            config.stage(unet_number), settings.section(Optimization), layout
        )
        step._train_step.cache_clear()
    # The small maps of the other networks are split by rows, too.
    rows_from = min(sharding.ROWS_FROM, config.stage(unet_number).sample_shape[0])
    with mock.patch.object(sharding, "ROWS_FROM", rows_from):
        state, metrics = train_step(create(params), layout.to_batch(batch, BATCH), layout.key(0))
    assert all(
        x.sharding.is_equivalent_to(wanted, x.ndim)
        for x, wanted in zip(
            jax.tree.leaves(state), jax.tree.leaves(layout.place(shapes)), strict=True
        )
    )
    trees = dict(gradients=state.opt_state[0], params=state.params, ema=state.ema)
    return {name: leaves(tree) for name, tree in (trees | {"metrics": metrics}).items()}


def leaves(tree) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in flat
    }


def assert_gradients_equal(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """To 1e-5 of the largest value of each leaf, or 1e-9 of the tree's, which is larger. Returns
    the largest difference in these terms."""
    largest = max(np.abs(x).max() for x in want.values())
    return _worst(
        "gradients",
        {
            name: np.abs(got[name] - x).max() / max(np.abs(x).max(), 1e-4 * largest)
            for name, x in want.items()
        },
        1e-5,
    )


def assert_same_step(case: Case) -> dict[str, float]:
    """Gradients, updated parameters and average equal those of the unsharded step. Returns how far
    they are apart."""
    got, want = outcome(case), outcome(case.unsharded)
    np.testing.assert_allclose(got["metrics"]["loss"], want["metrics"]["loss"], rtol=1e-5)
    apart = {"gradients": assert_gradients_equal(got["gradients"], want["gradients"])}
    for tree in ("params", "ema"):
        errors = {name: np.abs(got[tree][name] - x).max() for name, x in want[tree].items()}
        apart[tree] = _worst(tree, errors, 1e-6)
    return apart


def _worst(tree: str, errors: dict[str, float], bound: float) -> float:
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= bound}
    assert not wrong, f"{tree} differ: {wrong}"
    return float(max(errors.values()))
