"""The mesh grammar, the placement rule, and what becomes of rows and activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagen_jax import nn, presets, sharding, text
from imagen_jax.nn.layers import linear
from imagen_jax.sharding import Layout, constrain, make_layout, mesh_shape
from imagen_jax.text.t5 import abstract_encoder

P = jax.P


def layout(mesh: str, min_size: int = 0) -> Layout:
    return make_layout(mesh, rows=8, min_size=min_size)


@pytest.mark.parametrize(
    ("text", "count", "shape"),
    [
        ("8x1", 8, (8, 1)),
        ("-1x4", 8, (2, 4)),
        ("2x-1", 8, (2, 4)),
        ("auto", 8, (8, 1)),
        ("auto", 1, (1, 1)),
    ],
)
def test_the_grammar(text, count, shape):
    assert mesh_shape(text, count=count) == shape


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ("16x1", 16, "--mesh 16x1: 16x1 needs 16 devices, found 8"),
        ("8", 8, "--mesh 8: must be auto, or DATAxMODEL"),
        ("-1x-1", 8, "one of the two may be -1"),
        ("0x8", 8, "must be auto"),
        ("-1x3", 8, "8 devices cannot be divided into groups of 3"),
        ("8x1", 12, "12 images a step do not split evenly over 8 devices. 8 or 16 do"),
        ("auto", 3, "--mesh auto: 3 images a step do not split evenly over 8 devices. 8 do"),
    ],
)
def test_mistaken_meshes(text, rows, message):
    with pytest.raises(ValueError, match=message):
        make_layout(text, rows=rows)


def test_fewer_devices_than_there_are():
    assert layout("2x2").mesh.size == 4
    assert layout("8x1").mesh.axis_types == (jax.sharding.AxisType.Auto,) * 2


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (
            "downs/0/resnets/1/block1/project/kernel",
            (3, 3, 64, 128),
            P(None, None, "data", "model"),
        ),
        (
            "downs/0/resnets/1/block2/project/kernel",
            (3, 3, 64, 128),
            P(None, None, "model", "data"),
        ),
        ("1/mu/downs/0/init_block/cross_attn/to_q/kernel", (64, 32), P("data", "model")),
        ("mid_attn/layers/0/attn/to_out/kernel", (32, 64), P("model", "data")),
        ("mid_block1/cross_attn/to_kv/kernel", (64, 128), P("model", "data")),
        ("1/v/final_conv/kernel", (3, 3, 64, 3), P(None, None, "model", None)),  # 3 do not split
        ("1/v/init_conv/kernel", (7, 7, 3, 64), P(None, None, None, "model")),
        ("blocks/0/attention/q/kernel", (64, 128), P("data", "model")),
        ("blocks/0/feed_forward/wo/kernel", (128, 64), P("model", "data")),
        ("mid_block1/block1/norm/gamma", (4096,), P()),
    ],
)
def test_the_rule(path, shape, spec):
    assert layout("4x2").spec([n for n in path.split("/") if not n.isdecimal()], shape) == spec


def test_small_arrays_are_whole_and_axes_of_one_device_unnamed():
    assert layout("4x2", min_size=10_000).spec(["to_q", "kernel"], (64, 32)) == P()
    assert layout("8x1").spec(["to_q", "kernel"], (64, 32)) == P("data", None)
    assert layout("1x8").spec(["to_q", "kernel"], (64, 32)) == P(None, "model")


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x4", "1x8"])
def test_every_large_array_of_the_paper_is_split_over_all_devices(mesh):
    """U-Nets and T5-XXL, less deep: what one of 8 devices holds is less than a sixth of all."""
    xxl = text.T5Config(d_model=4096, d_ff=10240, num_layers=2, num_heads=64)
    unets = presets.BaseUnet64(num_resnet_blocks=1), presets.SRUnet256(num_resnet_blocks=1)
    trees = [nn.abstract(unet)[1] for unet in unets] + [abstract_encoder(xxl)[1]]
    place = make_layout(mesh, rows=8).place
    for tree in trees:
        whole, held = 0, 0
        for x, placed in zip(jax.tree.leaves(tree), jax.tree.leaves(place(tree)), strict=True):
            whole += x.size
            held += np.prod(placed.shard_shape(x.shape))
        assert held < whole / 6


def test_rows_are_those_of_the_global_batch():
    rows = np.arange(8 * 3).reshape(8, 3)
    here = layout("4x2")
    assert here.own_rows(8) == list(range(8))
    batch = here.to_batch({"x": rows}, 8)["x"]
    np.testing.assert_array_equal(batch, rows)
    assert batch.sharding == here.batch
    assert here.rows(8) == here.batch and here.rows(3) == here.replicated
    assert int(here.largest(7)) == 7


def placed(here: Layout, shape: tuple[int, ...], axes: str, **kwargs) -> jax.sharding.Sharding:
    """Where `constrain` places an array that was replicated."""
    x = jax.device_put(np.ones(shape, np.float32), here.replicated)
    with here.use():
        return jax.jit(lambda x: constrain(x, axes, **kwargs) + 0)(x).sharding


def assert_placed(shape: tuple[int, ...], axes: str, spec: jax.P, **kwargs) -> None:
    here = layout("2x4")
    got = placed(here, shape, axes, **kwargs)
    assert got.is_equivalent_to(here.named(spec), len(shape)), (shape, axes, got)


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((8, 6, 4, 16))
    assert constrain(x, "b h w c") is x
    with layout("2x4").use():
        assert sharding.splits(8) and not sharding.splits(6)
    assert not sharding.splits(8)


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((8, 6, 4, 16), "b h w _", P("data")),
        ((8, 6, 4, 16), "b h w c", P("data", None, None, "model")),
        ((8, 6, 4, 16), "b m n k", P("data", None, "model")),
        ((8, 6, 16), "b m c", P("data", None, "model")),
        ((8, 6, 16), "b l d", P("data")),
        ((8, 16), "b c", P("data", "model")),
        ((8,), "b ...", P("data")),
        ((8, 4, 4, 4), "b ...", P("data")),
        ((3, 6, 4, 16), "b h w _", P()),  # 3 rows do not split
        ((3, 6, 4, 15), "b h w c", P()),
    ],
)
def test_activations_are_split_by_the_names_of_their_axes(shape, axes, spec):
    assert_placed(shape, axes, spec)


def test_large_feature_maps_are_split_by_rows(monkeypatch):
    """In every form; what all pixels attend to is not."""
    monkeypatch.setattr(sharding, "ROWS_FROM", 16)
    for shape, axes, spec in (
        ((2, 16, 16, 8), "b h w c", P("data", "model")),
        ((2, 16, 16, 8), "b h w _", P("data", "model")),
        ((2, 16, 16, 8), "b ...", P("data")),
        ((2, 8, 8, 8), "b h w c", P("data", None, None, "model")),
        ((2, 18, 18, 8), "b h w c", P("data", None, None, "model")),  # 18 do not split
        ((2, 256, 8), "b m _", P("data")),
        ((2, 256, 4, 8), "b m n k", P("data", None, "model")),
    ):
        assert_placed(shape, axes, spec)
    assert_placed((2, 256, 8), "b p _", P("data", "model"), h=16)
    assert_placed((2, 256, 8), "b p c", P("data", "model"), h=16)
    assert_placed((2, 256, 4, 8), "b p n k", P("data", "model"), h=16)
    assert_placed((2, 225, 4, 8), "b p n k", P("data", None, "model"), h=15)


@pytest.mark.parametrize(
    ("height", "width", "by_rows"), [(64, 16, True), (16, 64, False), (34, 32, False)]
)
def test_flattened_pixels_are_split_as_their_feature_map(height, width, by_rows):
    """34 rows do not split over 4 devices, and 34 * 32 pixels are not split either."""
    rest = P("data", "model") if by_rows else P("data", None, None, "model")
    assert_placed((2, height, width, 8), "b h w c", rest)
    assert_placed((2, height, width, 8), "b h w _", P(*rest[:2]))
    pixels, h = height * width, height
    assert_placed((2, pixels, 8), "b p c", P(*rest[:2], *rest[3:]), h=h)
    assert_placed((2, pixels, 8), "b p _", P(*rest[:2]), h=h)
    heads = P("data", "model") if by_rows else P("data", None, "model")
    assert_placed((2, pixels, 4, 8), "b p n k", heads, h=h)


def test_tokens_are_never_split_however_many():
    for name in "ml":
        assert_placed((2, 2048, 8), f"b {name} d", P("data"))
        assert_placed((2, 2048, 8), f"b {name} c", P("data", None, "model"))
        assert_placed((2, 2048, 4, 8), f"b {name} n k", P("data", None, "model"))


@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 32, 4, 8), "b h w _"), ((2, 3, 32, 4, 8), "b f h w _")]
)
def test_a_linear_layer_leaves_rows_where_they_are(shape, axes):
    """Merged with 3 frames before them, rows would be gathered."""
    here = layout("2x4")
    layer = linear(8, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    apply = jax.jit(here.on_mesh(lambda x: constrain(layer(constrain(x, axes)), axes)))
    x = jax.device_put(np.ones(shape, np.float32), here.replicated)
    compiled = apply.lower(x).compile().as_text()
    assert "all-gather" not in compiled


def test_videos_are_split_as_their_frames():
    for height, at_rest, gathered in (
        (32, P("data", None, "model"), P("data", None, "model")),
        (16, P("data", None, None, None, "model"), P("data")),
    ):
        assert_placed((2, 64, height, 4, 8), "b f h w c", at_rest)
        assert_placed((2, 64, height, 4, 8), "b f h w _", gathered)


@pytest.mark.parametrize(
    ("shape", "axes", "h", "message"),
    [
        ((2, 4, 4, 8), "b h w", None, "do not fit an array of shape"),
        ((2, 16, 8), "b h w c", None, "do not fit"),
        ((2,), "b c ...", None, "do not fit"),
        ((), "b ...", None, "do not fit"),
        ((2, 16, 8), "batch p c", None, "'batch' is not one of"),
        ((2, 16, 8), "b ... c", None, "'...' is not one of"),
        ((2, 16, 8), "b p c", None, "p needs h="),
        ((2, 16, 8), "b p c", 3, "p needs h=.*got h=3"),
    ],
)
def test_names_that_do_not_fit_the_array(shape, axes, h, message):
    """With a mesh or without."""
    with pytest.raises(ValueError, match=message):
        constrain(jnp.ones(shape), axes, h=h)


def test_a_sharded_text_encoder_is_the_same():
    tokens = text.load_encoder("demo").tokenize(["a red apple", "taxi"] * 4)[:, :16]
    want = jax.jit(text.encode, static_argnums=1)(*_parameters(None), tokens)
    for mesh in ("4x2", "1x8"):  # 4 heads: not over 8 devices
        here = layout(mesh)
        params, config = _parameters(here)
        assert not params["blocks"][0]["attention"]["q"]["kernel"].is_fully_replicated
        encode = jax.jit(here.on_mesh(lambda p, t, c=config: text.encode(p, c, t)))
        got = encode(params, here.to_batch(tokens, 8))
        np.testing.assert_allclose(got[0], want[0], atol=1e-5)
        np.testing.assert_array_equal(got[1], want[1])


def _parameters(here: Layout | None):
    encoder = text.load_encoder("demo", layout=here)
    return encoder.params, encoder.config
