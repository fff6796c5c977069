"""The encoder against transformers' torch T5, and the properties that parity cannot show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from imagen_jax.interop.reference import import_imagen_pytorch
from imagen_jax.text import T5Config, encode, loading
from imagen_jax.text.t5 import abstract_encoder, relative_position_buckets

import_imagen_pytorch()  # it mends torchvision, which transformers' models import

CONFIGS = {
    "relu": T5Config(
        vocab_size=97,
        d_model=24,
        d_kv=7,
        d_ff=40,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        layer_norm_epsilon=1e-5,
    ),
    "gated-gelu": T5Config(
        vocab_size=61,
        d_model=30,
        d_kv=5,
        d_ff=52,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    ),
}
JITTED = jax.jit(encode, static_argnames="config")


def torch_t5(config: T5Config) -> transformers.T5EncoderModel:
    """Small and random in every tensor: at their usual start, norms and position bias hide."""
    torch.manual_seed(0)
    fields = {name: getattr(config, name) for name in T5Config.__dataclass_fields__}
    model = transformers.T5EncoderModel(transformers.T5Config(**fields)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            scale = 1.0 if name.endswith(("shared.weight", "bias.weight")) else 0.3
            tensor.normal_(std=scale).add_(1.0 if "norm" in name else 0.0)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(our config, our parameters through a Hugging Face folder, torch's model)."""
    model = torch_t5(CONFIGS[request.param])
    folder = tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder)
    config = loading.read_config(folder)
    assert config == CONFIGS[request.param]
    return config, loading.load_params(folder, config)[0], model


def random_tokens(config: T5Config, lengths: list[int], width: int) -> np.ndarray:
    tokens = np.random.default_rng(1).integers(1, config.vocab_size, (len(lengths), width))
    tokens[np.arange(width) >= np.array(lengths)[:, None]] = 0
    return tokens.astype(np.int32)


@pytest.mark.parametrize(
    ("lengths", "width"), [([1], 1), ([11, 4, 1], 11), ([150, 37], 160)], ids=str
)
def test_outputs_equal_those_of_transformers(pair, lengths, width):
    config, params, model = pair
    tokens = random_tokens(config, lengths, width)
    embeds, mask = JITTED(params, config, tokens)

    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    expected = np.where(tokens[:, :, None] != 0, expected.numpy(), 0)
    np.testing.assert_array_equal(mask, tokens != 0)
    np.testing.assert_allclose(embeds, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_padding_is_zero_and_changes_nothing(pair):
    config, params, _ = pair
    tokens = random_tokens(config, [11, 4, 1], 11)
    embeds, _ = JITTED(params, config, tokens)
    wider, _ = JITTED(params, config, np.pad(tokens, ((0, 0), (0, 9))))
    assert not np.any(np.asarray(embeds)[tokens == 0])
    np.testing.assert_allclose(wider[:, :11], embeds, atol=1e-5 * np.abs(embeds).max(), rtol=0)
    assert not np.any(np.asarray(wider)[:, 11:])


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (10, 33), (4, 2)])
def test_buckets_equal_those_of_transformers(buckets, distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    position = torch.arange(300)
    expected = T5Attention._relative_position_bucket(
        position[None, :] - position[:, None], num_buckets=buckets, max_distance=distance
    )
    ours = relative_position_buckets(300, num_buckets=buckets, max_distance=distance)
    np.testing.assert_array_equal(ours, expected.numpy())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_survives_large_activations(dtype):
    """The residual stream and float16's `wo` are float32: beyond 65504 nothing overflows."""
    config = CONFIGS["gated-gelu"]
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract_encoder(config)[1])
    rng = np.random.default_rng(0)
    wide, narrow = [], []
    for path, leaf in paths:
        names = tuple(key.key for key in path)
        scale = {"kernel": 0.2, "scale": 0.1}.get(names[-1], 1.0) * (2000.0 if "wo" in names else 1)
        value = rng.normal(scale=scale, size=leaf.shape) + (1.0 if names[-1] == "scale" else 0.0)
        # One rounding for both, so that only the arithmetic differs.
        wide.append(jnp.asarray(value, dtype).astype(jnp.float32))
        narrow.append(wide[-1].astype(loading.stored_dtype(names, dtype)))
    tokens = random_tokens(config, [9, 5], 9)
    expected, _ = JITTED(treedef.unflatten(wide), config, tokens)
    embeds, _ = JITTED(treedef.unflatten(narrow), config, tokens)
    assert embeds.dtype == jnp.float32 and np.all(np.isfinite(embeds))
    tolerance = 0.05 if dtype == jnp.bfloat16 else 0.01
    np.testing.assert_allclose(embeds, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"feed_forward_proj": "gated-silu"}, "'gated-silu'"),
        ({"num_heads": 0}, "num_heads = 0"),
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets = 7"),
        ({"model_type": "clip_text_model"}, "'clip_text_model'"),
    ],
)
def test_a_config_that_is_no_t5_is_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        T5Config.from_dict(fields)
