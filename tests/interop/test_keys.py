"""The key table: every name of the reference has its place, in both directions."""

import numpy as np
import pytest

from imagen_jax.config import UnetConfig
from imagen_jax.interop import keys
from imagen_jax.nn import abstract
from tests import parity

BASE = dict(
    dim=16,
    cond_dim=24,
    dim_mults=(1, 2),
    layer_attns=(False, True),
    layer_cross_attns=(False, True),
    attn_heads=2,
    attn_dim_head=8,
    text_embed_dim=40,
    attn_pool_num_latents=6,
    max_text_len=10,
)
CONFIGS = {
    "base": BASE,
    "super-resolution": BASE
    | dict(memory_efficient=True, lowres_cond=True, cond_images_channels=4),
    "group": BASE | dict(norm="group", combine_upsample_fmaps=True, pixel_shuffle_upsample=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact_and_loads_strictly(name):
    config = UnetConfig(**CONFIGS[name])
    reference = parity.reference_unet(config)
    theirs = parity.state_dict(reference)
    params = parity.our_params(reference, config)
    back = keys.to_torch(params)
    assert back.keys() == theirs.keys()
    for key in theirs:
        np.testing.assert_array_equal(back[key], theirs[key], err_msg=key)
    known = {"base": (272, 347_104), "super-resolution": (293, 500_346)}
    if name in known:
        assert (len(back), sum(a.size for a in back.values())) == known[name]


def test_a_null_unet_has_one_parameter():
    state_dict = {"dummy_parameter": np.zeros(1, np.float32)}
    params = keys.to_jax(state_dict, {"dummy_parameter": np.zeros(1, np.float32)})
    assert keys.to_torch(params).keys() == state_dict.keys()


def test_everything_that_does_not_fit_is_named_at_once():
    target = abstract(UnetConfig(**BASE))[1]
    state_dict = keys.to_torch(
        {**_zeros(target), "final_conv": {"kernel": np.zeros((3, 3, 16, 4)), "bias": np.zeros(3)}}
    )
    del state_dict["downs.1.3.layers.0.1.4.weight"]
    state_dict["ups.7.0.nonsense"] = np.zeros(1)
    with pytest.raises(keys.MisfitError, match="^3 of 273 tensors do not fit") as error:
        keys.to_jax(state_dict, target, prefix="unets.0.")
    assert error.value.problems == [
        keys.Problem("unknown", "unets.0.ups.7.0.nonsense", (1,), "none"),
        keys.Problem("missing", "unets.0.downs.1.3.layers.0.1.4.weight", (16, 32), "none"),
        keys.Problem("shape", "unets.0.final_conv.weight", (4, 16, 3, 3), "(3, 16, 3, 3)"),
    ]
    assert "unets.0.final_conv.weight" in str(error.value)


def test_the_nearest_name_is_shown():
    target = abstract(UnetConfig(**BASE))[1]
    state_dict = keys.to_torch(_zeros(target))
    state_dict["mid_block1.time_mlp.2.bias"] = state_dict.pop("mid_block1.time_mlp.1.bias")
    with pytest.raises(keys.MisfitError) as error:
        keys.to_jax(state_dict, target)
    unknown, missing = error.value.problems
    assert unknown.nearest == missing.name and missing.nearest == unknown.name


def test_a_parameter_outside_the_table_is_named():
    with pytest.raises(ValueError, match="not in the table: final_conv.colour"):
        keys.to_torch({"final_conv": {"colour": np.zeros(3)}})


def _zeros(tree):
    return (
        {k: _zeros(v) for k, v in tree.items()} if isinstance(tree, dict) else np.zeros(tree.shape)
    )
