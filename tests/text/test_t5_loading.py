"""Every layout of a Hugging Face folder gives the same parameters; what does not fit is named."""

import json
import shutil
import sys
import tracemalloc
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models, processors

from imagen_jax.interop.reference import import_imagen_pytorch
from imagen_jax.interop.torch_file import read_torch_file
from imagen_jax.text import load_encoder, loading, save_encoder

import_imagen_pytorch()  # it mends torchvision, which transformers' models import

FIELDS = dict(
    vocab_size=40,
    d_model=12,
    d_kv=5,
    d_ff=20,
    num_layers=2,
    num_heads=2,
    feed_forward_proj="gated-gelu",
)


@pytest.fixture(scope="module")
def model() -> transformers.T5ForConditionalGeneration:
    """A full T5, decoder and head included."""
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**FIELDS)).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """The encoder alone, one safetensors file, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("t5")
    encoder = transformers.T5EncoderModel(model.config)
    encoder.load_state_dict(model.state_dict(), strict=False)
    encoder.save_pretrained(folder)
    pieces = Tokenizer(
        models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3}, unk_token="<unk>")
    )
    pieces.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    pieces.enable_padding(length=7)
    pieces.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def params(folder):
    return load(folder)


def load(folder: Path, dtype=jnp.float32):
    return loading.load_params(folder, loading.read_config(folder), dtype=dtype)[0]


def test_what_is_saved_is_the_folder_again(folder, params, tmp_path):
    """Tensor by tensor; and transformers reads it."""
    encoder = load_encoder(folder)
    save_encoder(encoder, tmp_path / "saved")
    one, two = (
        safetensors.torch.load_file(where / "model.safetensors")
        for where in (folder, tmp_path / "saved")
    )
    one.pop("encoder.embed_tokens.weight", None)  # the table under its second name
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=0)
    assert load_encoder(tmp_path / "saved").sha256 == encoder.sha256
    ids = torch.tensor([[3, 2, 1]])
    with torch.no_grad():
        embeds = [
            transformers.T5EncoderModel.from_pretrained(where)(ids).last_hidden_state
            for where in (folder, tmp_path / "saved")
        ]
    torch.testing.assert_close(*embeds)


def copy_of(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to / "copy")


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the state dict of a folder with one safetensors file."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def save_full_sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="8KB")
    assert (folder / "model.safetensors.index.json").is_file()


def save_bin(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def save_legacy_bin(model, folder):
    model.config.save_pretrained(folder)
    torch.save(
        model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )


def save_sharded_bin(model, folder):
    model.config.save_pretrained(folder)
    items = list(model.state_dict().items())
    shards = {"a.bin": dict(items[::2]), "b.bin": dict(items[1::2])}
    for name, tensors in shards.items():
        torch.save(tensors, folder / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("save", [save_full_sharded, save_bin, save_legacy_bin, save_sharded_bin])
def test_every_layout_gives_the_same_parameters(save, model, params, tmp_path):
    """Full checkpoints here, where `params` come from the encoder alone."""
    save(model, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), params)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_bfloat16_on_disk_and_any_dtype_on_loading(suffix, folder, params, tmp_path):
    here = copy_of(folder, tmp_path)
    tensors = safetensors.torch.load_file(here / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if suffix == "bin":
        (here / "model.safetensors").unlink()
        torch.save(halves, here / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(halves, here / "model.safetensors")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, load(here), rounded)

    narrow = load(here, jnp.bfloat16)
    assert narrow["embedding"].dtype == jnp.bfloat16
    assert narrow["blocks"][1]["feed_forward"]["wo"]["kernel"].dtype == jnp.bfloat16
    assert narrow["norm"]["scale"].dtype == jnp.float32
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float32), b), narrow, rounded
    )
    half = load(here, jnp.float16)["blocks"][0]["feed_forward"]
    assert half["wo"]["kernel"].dtype == jnp.float32
    assert half["wi_0"]["kernel"].dtype == jnp.float16


def test_a_model_has_one_hash_in_every_file_and_dtype(model, folder, tmp_path):
    """The decoder, shards and bfloat16 change nothing; one value in one tensor does."""
    known = load_encoder(folder).identity
    for dtype in (jnp.bfloat16, jnp.float16):
        assert load_encoder(folder, dtype=dtype).sha256 == known.sha256
    save_full_sharded(model, tmp_path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    assert load_encoder(tmp_path).sha256 == known.sha256
    here = copy_of(folder, tmp_path)
    rewrite(here, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    load_encoder(here).identity.check(known, "a run")
    rewrite(here, lambda tensors: tensors["encoder.final_layer_norm.weight"][3:4].add_(0.1))
    with pytest.raises(ValueError, match=f"{here}.*is not that of a run.*weights differ") as it:
        load_encoder(here).identity.check(known, "a run")
    assert "\n" not in str(it.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_that_is_not_finite_is_named(dtype, folder, tmp_path):
    here, name = copy_of(folder, tmp_path), "encoder.block.1.layer.0.SelfAttention.k.weight"
    rewrite(here, lambda tensors: tensors[name][2:3, 4].fill_(np.nan))
    with pytest.raises(ValueError, match=f"{here} is damaged: NaN or infinity in {name}."):
        load_encoder(here, dtype=dtype)


def test_the_table_may_have_its_other_name(folder, params, tmp_path):
    here = copy_of(folder, tmp_path)

    def rename(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    rewrite(here, rename)
    jax.tree.map(np.testing.assert_array_equal, load(here), params)


def test_all_that_does_not_fit_is_named_at_once(folder, tmp_path):
    here = copy_of(folder, tmp_path)

    def spoil(tensors):
        del tensors["encoder.final_layer_norm.weight"]
        tensors["encoder.block.0.layer.0.SelfAttention.q.bias"] = torch.zeros(10)
        tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"] = torch.zeros(12, 21)

    rewrite(here, spoil)
    with pytest.raises(ValueError) as caught:
        load(here)
    line = str(caught.value)
    assert "\n" not in line
    assert "missing 1: norm/scale;" in line
    assert "unknown 1: encoder.block.0.layer.0.SelfAttention.q.bias;" in line
    assert "DenseReluDense.wo.weight (is (21, 12), must be (20, 12))" in line


def test_a_large_model_is_never_in_memory_twice(tmp_path):
    """numpy's allocations while 32 layers load: the arrays of a few tensors at a time."""
    fields = FIELDS | dict(d_model=64, d_ff=256, d_kv=32, num_layers=32)
    transformers.T5EncoderModel(transformers.T5Config(**fields)).save_pretrained(tmp_path)
    config = loading.read_config(tmp_path)
    loading.abstract_encoder(config)
    tracemalloc.start()
    loaded, _ = loading.load_params(tmp_path, config, dtype=jnp.bfloat16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    final = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    assert peak < 1.3 * final


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "config.json does not exist"),
        ({"config.json": "{"}, "config.json is not JSON"),
        ({"config.json": '{"model_type": "bert"}'}, "config.json: model_type = 'bert'"),
        ({"config.json": "{}"}, "no T5 weights"),
        ({"config.json": "{}", "model.safetensors": "junk"}, "model.safetensors is not a readable"),
        ({"config.json": "{}", "pytorch_model.bin": "junk"}, "could not be read as weights"),
        (
            {
                "config.json": "{}",
                "model.safetensors.index.json": '{"weight_map": {"a": "absent.safetensors"}}',
            },
            "absent.safetensors",
        ),
        ({"config.json": "{}", "tokenizer.json": "{}"}, "tokenizer.json is not a readable"),
        ({"config.json": '{"vocab_size": 99}'}, "32100 pieces.*vocab_size = 99"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_folder_gets_one_clear_line(files, named, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=named) as caught:
        load_encoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_brings_its_own_tokenizer(folder):
    encoder = load_encoder(folder)
    assert (encoder.width, encoder.is_demo) == (12, False)
    np.testing.assert_array_equal(encoder.tokenize(["cat"])[:, :4], [[3, 1, 0, 0]])
    embeds, mask = encoder(["cat", "dog"], length=4)
    assert embeds.shape == (2, 4, 12)
    np.testing.assert_array_equal(mask, [[True, True, False, False]] * 2)


def test_a_name_comes_from_the_hubs_cache(folder, params, tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--tiny-t5"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    encoder = load_encoder("someone/tiny-t5")
    jax.tree.map(np.testing.assert_array_equal, encoder.params, params)


def test_a_name_is_downloaded_in_one_format(model, tmp_path, monkeypatch):
    """A stand-in for the hub, whose repository has `.bin` weights only."""
    save_bin(model, tmp_path)
    asked = []

    def download(name, *, local_files_only=False, allow_patterns=None):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        asked.append(allow_patterns[-1])
        return tmp_path if "pytorch_model*.bin" in allow_patterns else tmp_path / "nothing"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert loading.find_folder("someone/tiny-t5") == tmp_path
    assert asked == ["model*.safetensors", "pytorch_model*.bin"]


@pytest.mark.parametrize(
    ("name", "named"),
    [("someone/no-such-t5", "could not be downloaded"), ("./no/such/folder", "no such folder")],
)
def test_an_unreachable_name_gets_one_clear_line(name, named, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=named) as caught:
        load_encoder(name)
    assert "\n" not in str(caught.value)


def test_a_torch_file_keeps_its_structure(tmp_path):
    path = tmp_path / "x.pt"
    table = torch.arange(6.0).reshape(2, 3)
    torch.save(
        {"model": {"a": table.T, "b": table.bfloat16().T}, "steps": [7], "version": "2.1.0"}, path
    )
    read = read_torch_file(path)
    np.testing.assert_array_equal(read["model"]["a"], table.numpy().T)
    assert read["model"]["b"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read["model"]["b"].astype(np.float32), table.numpy().T)
    assert (read["steps"], read["version"]) == ([7], "2.1.0")


def test_a_torch_file_without_names_is_no_state(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save([torch.zeros(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds a list, not named tensors"):
        load_encoder(tmp_path)


def test_a_torch_file_with_code_is_refused(tmp_path):
    torch.save({"path": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="never executed") as caught:
        read_torch_file(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_a_missing_torch_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[torch\]'"):
        read_torch_file(tmp_path / "x.pt")
