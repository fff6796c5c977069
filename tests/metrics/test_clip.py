"""Both towers of CLIP against transformers' torch model, on random weights in its own folder."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from imagen_jax.errors import UserError
from imagen_jax.interop.reference import import_imagen_pytorch
from imagen_jax.metrics import clip
from imagen_jax.metrics.clip import load_clip

import_imagen_pytorch()  # it mends torchvision, which transformers' models import

WORDS = ["<start>", "<end>", "a", "red", "circle", "above", "blue", "square", "<unk>"]
TEXT = dict(
    vocab_size=9, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=3, max_position_embeddings=7, bos_token_id=0, eos_token_id=1,
    pad_token_id=1,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    image_size=12, patch_size=4,
)  # fmt: skip
TEXTS = ["a red circle above a blue square", "a circle", "red"]


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def model(request):
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=TEXT | {"hidden_act": request.param},
        vision_config=VISION | {"hidden_act": request.param},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    pieces = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", None, [("<start>", 0), ("<end>", 1)]
    )
    pieces.save(str(folder / "tokenizer.json"))
    return folder


def unit(x: torch.Tensor) -> np.ndarray:
    return (x / x.norm(dim=-1, keepdim=True)).numpy()


def test_the_text_tower_is_torchs(model, folder):
    loaded = load_clip(folder)
    ids = loaded.tokenize(TEXTS)
    assert ids.shape == (3, 7) and ids[0, -1] == 1  # cut, and it still ends
    assert ids[2].tolist() == [0, 3, 1, 1, 1, 1, 1]
    with torch.no_grad():
        states = model.text_model(torch.from_numpy(ids).long()).pooler_output
        expected = unit(model.text_projection(states))
    found = loaded.embed_texts(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_image_tower_is_torchs(model, folder):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((12, 12, 3), (20, 31, 3))]
    loaded = load_clip(folder)
    pixels = np.stack([clip.prepare(image, 12) for image in images])
    with torch.no_grad():
        nchw = torch.from_numpy(np.moveaxis(pixels, -1, 1).copy())
        expected = unit(model.visual_projection(model.vision_model(nchw).pooler_output))
    np.testing.assert_allclose(loaded.embed_images(images), expected, atol=1e-5)


def test_images_are_prepared_as_the_released_models_are():
    """The shorter side to the size, the centre, and the published mean and deviation."""
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    resized = Image.fromarray(image).resize((20, 12), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((4, 0, 16, 12)), np.float32) / 255
    found = clip.prepare(image, 12) * clip.STD + clip.MEAN
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_scores():
    images = np.array([[1.0, 0], [0, 1], [0.6, 0.8]])
    texts = np.array([[0.8, 0.6], [0, -1], [0.6, 0.8]])
    np.testing.assert_allclose(clip.score(images, texts), [80, 0, 100])
    assert clip.r_precision(images, texts) == pytest.approx(1 / 3 + 1 / 3)
    assert clip.r_precision(images, images) == 1


def test_what_does_not_fit_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="is not a CLIP folder"):
        load_clip(tmp_path)
    data = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    data["projection_dim"] = 8
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"does not fit its config.json: text_projection.weight"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(data | {"model_type": "t5"}))
    with pytest.raises(UserError, match="model_type = 't5' is not 'clip'"):
        load_clip(tmp_path)
