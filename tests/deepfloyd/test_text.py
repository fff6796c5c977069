"""Captions as DeepFloyd IF reads them: 77 tokens, padding and all, the empty text for none."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from tests.deepfloyd import networks  # isort: skip  # it mends torchvision
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from imagen_jax import Imagen, checkpoint, nn, text
from imagen_jax.errors import UserError
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.pipeline import Pipeline

CAPTIONS = ["a red circle above a blue square", "", "very " * 120 + "long"]
UNET = dict(dim=32, dim_mults=(1,), num_resnet_blocks=1, layer_attns=(True,), attn_dim_head=16)


def config(**more):
    unet = IFUnetConfig(**UNET, pool_heads=4, **more)
    base = dataclasses.replace(networks.CONFIG, text_encoder_name="demo", text_embed_dim=None)
    return dataclasses.replace(
        base,
        unets=(unet,),
        image_sizes=(8,),
        discrete=dataclasses.replace(base.discrete, sample_max_value=1.5),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    text.save_encoder(text.load_encoder("demo"), path)
    return path


def test_embeddings_are_those_of_transformers_padding_included(folder):
    model = T5EncoderModel.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    tokens = tokenizer(
        CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    encoder = text.cascade_encoder(config(), name=str(folder))
    embeds, masks = encoder(CAPTIONS, length=77)
    assert masks.sum(1).tolist() == tokens.attention_mask.sum(1).tolist()
    np.testing.assert_allclose(embeds, wanted.numpy(), atol=1e-5 * np.abs(wanted.numpy()).max())
    assert np.abs(embeds[1, 1:]).max() > 0.1  # padding


def test_no_text_is_the_empty_text(tmp_path):
    """A pipeline guides away from it by itself, and so does the library."""
    cascade = config(null_text="encoded")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jax.numpy.asarray(0.1 * rng.normal(size=x.shape), x.dtype),
        nn.abstract(cascade.unets[0])[1],
    )
    imagen = Imagen(cascade, unets=[nn.bind(cascade.unets[0], params)])
    checkpoint.save(tmp_path / "run", imagen)
    pipeline = Pipeline.load(tmp_path / "run")
    assert pipeline.defaults()["cond_scale"] == (7.0,)
    drawn = [
        pipeline("a red apple", num_inference_steps=3, output_type="np", **more).images[0]
        for more in ({}, dict(negative_prompt=""), dict(negative_prompt="a pear"))
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3
    given = dict(cond_scale=5.0, timesteps=2, key=jax.random.key(0))
    plain = imagen.sample(texts=["a red apple"], **given)
    same = imagen.sample(texts=["a red apple"], negative_texts=[" "[:0]], **given)
    np.testing.assert_array_equal(plain, same)
    # Embeddings alone do not say what it is.
    (embeds, masks), (none, of_none) = map(imagen.encode_text, (["a red apple"], [""]))
    stored = dict(text_embeds=embeds, text_masks=masks)
    with pytest.raises(
        UserError, match="missing text is encoded as the empty caption: .* negative_text_embeds"
    ):
        imagen.sample(**stored, **given)
    absent = dict(negative_text_embeds=none, negative_text_masks=of_none)
    np.testing.assert_array_equal(plain, imagen.sample(**stored, **absent, **given))
    assert imagen.sample(**stored, **given | dict(cond_scale=1.0)).shape == plain.shape
