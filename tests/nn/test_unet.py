"""The U-Net's own promises: sizes of the presets, and equal results by every way to an output."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagen_jax import presets
from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.errors import UserError
from imagen_jax.imagen import Imagen
from imagen_jax.nn import abstract, bind, init_params
from imagen_jax.streams import ParamKeys

CONFIG = UnetConfig(
    dim=8,
    dim_mults=(1, 2),
    attn_dim_head=4,
    attn_heads=2,
    text_embed_dim=6,
    max_text_len=8,
    attn_pool_num_latents=3,
    init_cross_embed_kernel_sizes=(3,),
    layer_attns=(False, True),
    layer_cross_attns=(False, True),
)


@pytest.mark.parametrize(
    "config, count",
    [
        (presets.BaseUnet64(), 1_625_742_116),
        (presets.SRUnet256(lowres_cond=True), 732_036_754),
        (presets.SRUnet1024(lowres_cond=True), 721_244_562),
    ],
    ids=["BaseUnet64", "SRUnet256", "SRUnet1024"],
)
def test_presets_have_the_parameters_of_the_reference(config, count):
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(abstract(config)[1])) == count


@pytest.fixture(scope="module")
def params():
    """Fresh, but with a final convolution that is not zero."""
    init = jax.jit(lambda key: init_params(CONFIG, key))
    params = init(jax.random.key(0))
    kernel = params["final_conv"]["kernel"]
    assert not np.any(kernel)
    params["final_conv"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), kernel.shape)
    return params


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    return dict(
        x=random.standard_normal((2, 4, 4, 3), np.float32),
        time=np.float32([2.0, -1.0]),
        text_embeds=random.standard_normal((2, 5, 6), np.float32),
        text_mask=np.arange(5) < np.array([[5], [3]]),
    )


@pytest.fixture(scope="module")
def run():
    return jax.jit(
        lambda params, inputs, keep_mask: bind(CONFIG, params)(**inputs, keep_mask=keep_mask),
    )


def test_a_dropped_text_leaves_no_trace(params, inputs, run):
    other = inputs | dict(text_embeds=-inputs["text_embeds"])
    mixed = np.array([True, False])
    one, two = run(params, inputs, mixed), run(params, other, mixed)
    np.testing.assert_array_equal(one[1], two[1])
    assert np.abs(one[0] - two[0]).max() > 1e-3


def test_padding_leaves_no_trace(params, inputs, run):
    """What stands in masked places of a text is never seen."""
    keep = np.array([True, True])
    embeds = np.where(inputs["text_mask"][..., None], inputs["text_embeds"], 99.0)
    np.testing.assert_array_equal(
        run(params, inputs, keep), run(params, inputs | dict(text_embeds=embeds), keep)
    )


def test_guided_pairs_in_one_batch_equal_two_calls(params, inputs, run):
    """Prepared texts, each image twice: with text, without, with, without."""

    @jax.jit
    def both(params, x, time, text_embeds, text_mask):
        unet = bind(CONFIG, params)
        texts = [jnp.repeat(a, 2, axis=0) for a in (text_embeds, text_mask)]
        text_cond = unet.encode_text(*texts, keep_mask=jnp.array([True, False] * 2))
        return unet(jnp.repeat(x, 2, axis=0), jnp.repeat(time, 2), text_cond=text_cond)

    got = both(params, **inputs)
    for i, keep in enumerate((True, False)):
        want = run(params, inputs, np.array([keep] * 2))
        np.testing.assert_allclose(got[i::2], want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_keep_probability_is_that_of_the_draws(params, inputs):
    """A key decides the rows: each row is one of the two, and both occur."""
    unet = bind(CONFIG, params)
    inputs = {name: np.repeat(a[:1], 64, axis=0) for name, a in inputs.items()}

    def draw(keep_mask, key):
        return unet(**inputs, cond_drop_prob=0.25, keep_mask=keep_mask, key=key)

    draw = jax.jit(draw)
    kept, dropped = (np.asarray(draw(np.full(64, k), None))[0] for k in (True, False))
    drawn = np.asarray(draw(None, jax.random.key(3)))
    is_kept, is_dropped = (np.abs(drawn - a).max((1, 2, 3)) < 1e-4 for a in (kept, dropped))
    assert np.all(is_kept ^ is_dropped)
    assert 6 <= is_dropped.sum() <= 27  # 16 +- 3 standard deviations


@pytest.mark.slow
def test_remat_changes_nothing(params, inputs):
    def loss(params, remat):
        return jnp.mean(bind(CONFIG, params, remat=remat)(**inputs) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, saved = gradient(params, None), gradient(params, "nothing_saveable")
    largest = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("name", ["save_only_these_names", "__doc__"])
def test_what_makes_a_policy_is_none(name):
    with pytest.raises(UserError, match="not one of nothing_saveable, dots_with"):
        abstract(CONFIG, remat=name)


def test_a_profile_names_level_and_block(params, inputs):
    text = jax.jit(lambda p: bind(CONFIG, p)(**inputs)).lower(params).as_text(debug_info=True)
    for name in ("text/", "down0/ResnetBlock", "down1/Transformer", "middle/", "up1/", "final/"):
        assert name in text, name


def test_a_fresh_unet_starts_as_torch_does(params):
    """Uniform within 1 / sqrt(fan in); pixel shuffles from four equal copies, without bias."""
    kernel = params["time"]["to_cond"]["kernel"]
    bound = kernel.shape[0] ** -0.5
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    np.testing.assert_allclose(np.std(kernel), bound / math.sqrt(3), rtol=0.05)
    shuffle = params["ups"][0]["after"]["conv"]
    copies = np.asarray(shuffle["kernel"]).reshape(-1, 4)
    np.testing.assert_array_equal(copies, copies[:, :1].repeat(4, 1))
    assert not np.any(shuffle["bias"])


def test_keys_of_parameters_are_those_of_flax():
    theirs = nnx.Rngs(params=jax.random.key(5))
    ours = jax.jit(lambda key: [(keys := ParamKeys(key)).params(), keys.params()])
    for key, wanted in zip(
        ours(jax.random.key(5)), (theirs.params(), theirs.params()), strict=True
    ):
        assert key == wanted


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=np.zeros((2, 3, 4, 3), np.float32)), "3 x 4 pixels"),
        (dict(x=np.zeros((2, 4, 4, 1), np.float32)), "1 channels"),
        (dict(text_embeds=np.zeros((2, 5, 7), np.float32)), "text_embed_dim = 6"),
        (dict(cond_drop_prob=0.5), "needs a key"),
        (dict(lowres_cond_img=np.zeros((2, 4, 4, 3), np.float32)), "lowres_cond_img"),
        (dict(cond_images=np.zeros((2, 4, 4, 1), np.float32)), "cond_images_channels = 0"),
    ],
)
def test_wrong_inputs_are_named(params, inputs, change, message):
    with pytest.raises(ValueError, match=message):
        bind(CONFIG, params)(**inputs | change)


def test_a_network_prints_on_a_screen():
    """Of the paper's depth: not a line for every layer."""
    unet = dict(dim=8, dim_mults=(1, 2, 3, 4), num_resnet_blocks=3, text_embed_dim=6)
    config = ImagenConfig(unets=(UnetConfig(**unet),) * 2, image_sizes=(8, 16), text_embed_dim=6)
    shapes = [abstract(unet)[1] for unet in config.unets]
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    unets = [bind(unet, params) for unet, params in zip(config.unets, zeros, strict=True)]
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(shapes[0]))
    assert repr(unets[0]).startswith(f"Unet({count:,} parameters, float32, UnetConfig(dim=8")
    imagen = Imagen(config, unets=unets)
    assert len(repr(imagen)) < 5000 and repr(imagen).count("\n") == 2
