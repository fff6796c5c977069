"""DeepFloyd IF's U-Net against diffusers', weights copied over: outputs, gradients, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from imagen_jax import nn, presets
from imagen_jax.errors import UserError
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.interop import if_configuration, keys, verify_if
from imagen_jax.interop.if_table import IF_UNET
from tests.deepfloyd import networks

SMALL = dict(dim=64, attn_dim_head=16, text_embed_dim=96, pool_heads=4)
STAGES = {
    "base": (IFUnetConfig(**SMALL, num_resnet_blocks=1), 16),
    "super-resolution": (
        presets.IFStageII(
            dim_mults=(1, 2, 4),
            num_resnet_blocks=(1, 2, 3),
            layer_attns=(False, False, True),
            **SMALL | dict(time_cond_dim=96),
        ),
        32,
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_and_gradients_are_those_of_diffusers(stage):
    config, size = STAGES[stage]
    reference, given = networks.reference(config, size), verify_if.inputs(config, size)
    state = {name: value.numpy() for name, value in reference.state_dict().items()}
    params = keys.to_jax(state, nn.abstract(config)[1], table=IF_UNET)
    back = keys.to_torch(params, table=IF_UNET)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)

    target = np.random.default_rng(5).normal(size=(2, size, size, 6)).astype(np.float32)
    wanted = verify_if.answer(reference, given)
    (wanted * torch.from_numpy(target)).sum().backward()

    def loss(params):
        answer = nn.bind(config, params)(**given)
        return jnp.sum(answer * target), answer

    params = jax.tree.map(jnp.asarray, params)
    (_, got), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(got, wanted.detach().numpy(), atol=2e-5)
    found = keys.to_torch(gradient, table=IF_UNET)
    wanted = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    largest = max(np.abs(value).max() for value in wanted.values())
    # Added to all keys alike, it moves all logits of the pool alike: only rounding is left.
    zero = "add_embedding.pool.k_proj.bias"
    assert max(np.abs(part.pop(zero)).max() for part in (wanted, found)) < 1e-6 * largest
    for name, value in wanted.items():
        allowed = 1e-3 * max(np.abs(value).max(), 1e-4 * largest)
        np.testing.assert_allclose(found[name], value, atol=allowed, err_msg=name)


@pytest.mark.parametrize(
    "config, count",
    [
        (presets.IFStageI("M"), 371_605_830),
        (presets.IFStageI("L"), 935_365_830),
        (presets.IFStageI("XL"), 4_304_695_110),
        (presets.IFStageII("M"), 482_483_334),
        (presets.IFStageII("L"), 1_243_277_190),
    ],
)
def test_the_released_networks_have_as_many_parameters(config, count):
    shapes = nn.abstract(config)[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_the_papers_base():
    leaves = jax.tree.leaves(nn.abstract(presets.ImagenBase64())[1])
    learns = jax.tree.leaves(nn.abstract(presets.ImagenBase64(learned_variance=True))[1])
    assert sum(leaf.size for leaf in learns) == 2_305_396_230
    assert sum(leaf.size for leaf in leaves) == 2_305_396_230 - 3 * (9 * 512 + 1)


def test_every_file_of_a_configuration_says_the_same():
    """The published config.yml of IF-I-XL and what its config.json says."""
    original = dict(
        image_size=64, model_channels=704, num_res_blocks=3, channel_mult="1,2,3,4",
        attention_resolutions="32,16,8", num_heads=1, num_head_channels=64,
        num_heads_upsample=-1, use_scale_shift_norm=True, dropout=0, resblock_updown=True,
        encoder_dim=4096, encoder_channels=2816, in_channels=3, out_channels=6,
        activation="gelu", att_pool_heads=64, disable_self_attentions=False, precision="16",
    )  # fmt: skip
    found, size = if_configuration.from_original({"params": original})
    assert size == 64
    written = if_configuration.to_diffusers(found, 64)
    assert written == if_configuration.to_diffusers(presets.IFStageI("XL"), 64)
    assert if_configuration.to_diffusers(if_configuration.from_diffusers(written)[0], 64) == written
    for change, message in (
        (dict(mid_block_type="UNetMidBlock2DCrossAttn"), "mid_block_type = 'UNetMidBlock2DCross"),
        (dict(down_block_types=["DownBlock2D"] * 4), "are not those of a U-Net of DeepFloyd IF"),
        (dict(out_channels=4), "4 output channels for images of 3"),
    ):
        with pytest.raises(UserError, match=message):
            if_configuration.from_diffusers(written | change)


def test_bad_inputs_are_named():
    config, size = STAGES["base"]
    network = nn.bind(config, jax.tree.map(lambda x: jnp.zeros(x.shape), nn.abstract(config)[1]))
    given = verify_if.inputs(config, size)
    for change, message in (
        (dict(text_embeds=None), "this U-Net needs text"),
        (dict(x=np.zeros((2, 12, 12, 3), np.float32)), "needs multiples of 8"),
        (dict(lowres_cond_img=given["x"]), "does not take lowres_cond_img"),
        (dict(text_embeds=given["text_embeds"][..., :5]), "text_embeds are 5 wide"),
    ):
        with pytest.raises(UserError, match=message):
            network(**given | change)
    with pytest.raises(UserError, match="multiples of 32"):
        IFUnetConfig(dim=40)
    with pytest.raises(UserError, match="pool_heads = 7 does not divide"):
        IFUnetConfig(dim=64, pool_heads=7)
