"""Our U-Net against imagen-pytorch's, weights copied over: outputs, and gradients of every leaf.

Each case is compiled once. Together they use every field of `UnetConfig`.
"""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from imagen_jax import unet_config
from imagen_jax.config import UnetConfig
from imagen_jax.interop import keys
from imagen_jax.nn import abstract, bind
from tests import parity

SMALL = dict(
    dim=8,
    cond_dim=10,
    dim_mults=(1, 2),
    attn_dim_head=5,
    attn_heads=3,
    text_embed_dim=6,
    max_text_len=8,
    attn_pool_num_latents=3,
    init_cross_embed_kernel_sizes=(3, 7),
)
NO_ATTENTION = dict(layer_attns=False, layer_cross_attns=False, attend_at_middle=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration and its inputs; `text` is the length of the text, None for no text."""

    name: str
    unet: dict
    size: int = 8
    text: int | None = 5
    mask: bool = True
    keep: tuple[bool, bool] | None = None
    drop: float = 0.0
    self_cond: bool = False
    cond_images: int | None = None
    gradients: bool = False

    @property
    def config(self) -> UnetConfig:
        ignored = set(unet_config._IGNORED)  # one warning a process, left to its own test
        with mock.patch.object(unet_config, "_warned", ignored):
            return UnetConfig(**SMALL | self.unet)

    def inputs(self) -> dict[str, np.ndarray | float]:
        config, random = self.config, np.random.default_rng(7)

        def normal(*shape):
            return random.standard_normal(shape, np.float32)

        image = (2, self.size, self.size, config.channels)
        inputs = dict(x=normal(*image), time=np.float32([3.1, -1.7]))
        if self.text is not None:
            inputs["text_embeds"] = normal(2, self.text, SMALL["text_embed_dim"])
            inputs["cond_drop_prob"] = self.drop
            if self.mask:
                inputs["text_mask"] = np.arange(self.text) < np.array([[self.text], [2]])
            if self.keep is not None:
                inputs["keep_mask"] = np.array(self.keep)
        if config.lowres_cond:
            inputs |= dict(lowres_cond_img=normal(*image), lowres_noise_times=normal(2))
        if self.self_cond:
            inputs["self_cond"] = normal(*image)
        if self.cond_images is not None:
            channels = config.cond_images_channels
            inputs["cond_images"] = normal(2, self.cond_images, self.cond_images, channels)
        return inputs


CASES = [
    Case(
        "text",
        dict(
            dim=12,
            num_resnet_blocks=(1, 2),
            layer_attns=(False, True),
            layer_cross_attns=(False, True),
            layer_attns_depth=(1, 2),
            layer_mid_attns_depth=2,
            ff_mult=1.5,
        ),
        gradients=True,
    ),
    Case(
        "super-resolution",
        dict(
            memory_efficient=True,
            lowres_cond=True,
            layer_attns=(False, True),
            cond_images_channels=2,
            resize_mode="bilinear",
        ),
        text=11,
        keep=(True, False),
        cond_images=5,
        gradients=True,
    ),
    Case(
        "linear attention",
        dict(
            layer_attns=(False, True),
            layer_cross_attns=False,
            use_linear_attn=(True, False),
            use_linear_cross_attn=(True, False),
            layer_attns_depth=2,
        ),
        mask=False,
        text=11,
        gradients=True,
    ),
    Case(
        "group norm",
        dict(dim=16, norm="group", layer_attns=False),
        keep=(False, True),
        gradients=True,
    ),
    Case(
        "unconditional",
        dict(
            NO_ATTENTION,
            cond_on_text=False,
            text_embed_dim=None,
            channels=1,
            channels_out=2,
            init_cross_embed=False,
            init_conv_kernel_size=5,
        ),
        text=None,
    ),
    Case(
        "self-conditioning",
        dict(self_cond=True, combine_upsample_fmaps=True, scale_skip_connection=False),
        self_cond=True,
        drop=1.0,
    ),
    Case(
        "self-conditioning, none given",
        dict(
            self_cond=True,
            memory_efficient=True,
            combine_upsample_fmaps=True,
            pixel_shuffle_upsample=False,
            layer_attns=False,
        ),
        mask=False,
    ),
    Case(
        "no final block",
        dict(
            final_resnet_block=False,
            final_conv_kernel_size=1,
            init_conv_to_final_conv_residual=True,
            pixel_shuffle_upsample=False,
        ),
        text=8,
    ),
    Case("cross-embed down", dict(cross_embed_downsample=True, attn_pool_text=False), mask=False),
    Case(
        "cross-embed down first",
        dict(
            cross_embed_downsample=True,
            cross_embed_downsample_kernel_sizes=(4, 2, 6),
            memory_efficient=True,
            layer_attns=False,
            use_linear_attn=True,
            use_linear_cross_attn=True,
        ),
        keep=(False, True),
    ),
    Case(
        "no pool",
        dict(
            attn_pool_text=False,
            num_time_tokens=3,
            learned_sinu_pos_emb_dim=6,
            use_global_context_attn=False,
        ),
        text=12,
        keep=(True, False),
    ),
    Case(
        "low resolution, no text given",
        dict(
            lowres_cond=True,
            self_cond=True,
            final_resnet_block=False,
            init_conv_to_final_conv_residual=True,
            combine_upsample_fmaps=True,
            attend_at_middle=False,
        ),
        text=None,
        self_cond=True,
    ),
    Case(
        "odd widths, three levels",
        dict(
            dim=9,
            cond_dim=None,
            dim_mults=(1, 3, 2),
            layer_attns=(True, False, True),
            layer_cross_attns=(False, True, False),
            init_cross_embed_kernel_sizes=(3, 7, 15),
            cond_images_channels=1,
        ),
        cond_images=16,
    ),
    Case(
        "another first width, ignored fields",
        dict(
            init_dim=11,
            layer_attns=False,
            num_image_tokens=2,
            out_dim=5,
            layer_attns_add_text_cond=False,
            dropout=0.3,
        ),
        size=4,
    ),
]


def test_the_cases_use_every_field():
    for field in dataclasses.fields(UnetConfig):
        values = {getattr(case.config, field.name) for case in CASES}
        assert values - {field.default}, field.name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case):
    config, inputs = case.config, case.inputs()
    reference = parity.reference_unet(config)
    params = parity.our_params(reference, config)
    drop = inputs.get("cond_drop_prob", 0.0)
    arrays = {name: a for name, a in inputs.items() if name != "cond_drop_prob"}

    def loss(params, arrays, target):
        output = bind(config, params)(**arrays, cond_drop_prob=drop)
        return jnp.mean((output - target) ** 2), output

    run = jax.value_and_grad(loss, has_aux=True) if case.gradients else loss
    with torch.set_grad_enabled(case.gradients):
        want = parity.forward(reference, inputs)
    target = np.random.default_rng(1).standard_normal(want.shape, np.float32)
    got = jax.jit(run)(params, arrays, np.moveaxis(target, 1, -1))
    output = (got[0] if case.gradients else got)[1]
    expected = np.moveaxis(want.detach().numpy(), 1, -1)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.1

    if case.gradients:
        torch.mean((want - torch.from_numpy(target)) ** 2).backward()
        compare_gradients(got[1], reference, config)


def compare_gradients(got, reference, config):
    """Leaf by leaf, to 1e-3 of the leaf's largest value or 1e-7 of the tree's.

    The second bound serves leaves, such as the bias of `gca.to_k`, whose gradient is zero.
    """
    gradients = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in reference.named_parameters()
    }
    want = keys.to_jax(gradients, abstract(config)[1])
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want))
    assert largest > 0
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        bound = 1e-3 * max(np.abs(theirs).max(), 1e-4 * largest)
        message = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=message)
