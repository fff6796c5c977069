"""Folders of DeepFloyd IF: read, converted, written, and loaded again by diffusers."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
import torch
from PIL import Image

import imagen_jax
from imagen_jax import nn, presets, run_config
from imagen_jax.errors import UserError
from imagen_jax.interop import __main__ as interop
from imagen_jax.interop import deepfloyd, keys
from imagen_jax.interop.if_table import IF_UNET, modules
from imagen_jax.text import load_tokenizer
from tests.deepfloyd import networks  # it mends torchvision, for transformers

from tests.deepfloyd.networks import diffusers  # isort: skip
from transformers import T5Config, T5EncoderModel  # isort: skip


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
        interop.main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both stages as diffusers saves them, the second in shards of half precision too."""
    found = []
    for i, network in enumerate(networks.networks()):
        folder = tmp_path_factory.mktemp("stages") / f"stage{i + 1}"
        network.save_pretrained(folder / "unet")
        networks.scheduler(i).save_pretrained(folder / "scheduler")
        found.append(folder)
    return found


@pytest.mark.slow
def test_folders_become_a_cascade_and_folders_again(folders, command, tmp_path):
    run, back = tmp_path / "run", tmp_path / "back"
    said = command("from-diffusers", *folders, run, "--verify")
    assert said.count("differs from diffusers") == 2 and "DeepFloyd's licence" in said
    config = run_config.read(run)
    assert config.image_sizes == networks.SIZES and config.discrete == networks.CONFIG.discrete
    assert config.dynamic_thresholding_percentile == 0.95
    found = imagen_jax.load(run)
    for unet, network in zip(found.unets, networks.networks(), strict=True):
        state = keys.to_torch(jax.device_get(nn.params_of(unet)), table=IF_UNET)
        for name, value in network.state_dict().items():
            np.testing.assert_array_equal(state[name], value.numpy())
    for number, kind in ((1, diffusers.IFPipeline), (2, diffusers.IFSuperResolutionPipeline)):
        out = back / str(number)
        said = command("to-diffusers", run, out, "--unet-number", number)
        assert "note: this U-Net" not in said
        pipe = kind.from_pretrained(out)
        assert isinstance(pipe.scheduler, diffusers.DDPMScheduler)
        assert pipe.scheduler.config.variance_type == "learned_range"
        assert (
            pipe.scheduler.config.sample_max_value
            == networks.scheduler(number - 1).config.sample_max_value
        )
        wanted = networks.networks()[number - 1].state_dict()
        for name, value in pipe.unet.state_dict().items():
            assert torch.equal(value, wanted[name]), name


def test_shards_and_variants(folders, command, tmp_path, monkeypatch):
    """Half precision in shards, as the hub has them, read by diffusers and by us."""
    run, out = tmp_path / "run", tmp_path / "half"
    command("from-diffusers", folders[1], run)  # super-resolution alone
    assert run_config.read(run).image_sizes == (8, 32)
    monkeypatch.setattr(deepfloyd, "SHARD", 2 * 10**6)
    command("to-diffusers", run, out, "--unet-number", 2, "--variant", "fp16")
    shards = sorted(path.name for path in (out / "unet").glob("*.safetensors"))
    assert len(shards) > 1 and shards[0].startswith("diffusion_pytorch_model.fp16-00001-of-")
    loaded = diffusers.UNet2DConditionModel.from_pretrained(out / "unet", variant="fp16")
    read = deepfloyd.read(out, "fp16")
    state = keys.to_torch(read.params, table=IF_UNET)
    for name, value in loaded.state_dict().items():
        np.testing.assert_array_equal(state[name], value.numpy().astype(np.float16))
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model.safetensors or .bin; it"):
        deepfloyd.read(out)
    (out / "unet" / shards[-1]).unlink()
    with pytest.raises(UserError, match="names .*, which is missing"):
        deepfloyd.read(out, "fp16")


def original(unet, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights in the original's names: its attention is one matrix, head by head."""
    names = {}
    for theirs, (ours, inner) in modules(unet).items():
        for name in [n for n in state if n.startswith(ours + ".")]:
            part, _, kind = name[len(ours) + 1 :].rpartition(".")
            if inner is None:
                names[".".join(filter(None, (theirs, part, kind)))] = state[name]
                continue
            back = {value: key for key, value in inner.items()}
            if part in back:
                value = state[name]
                proj = back[part] == "proj_out" and kind == "weight"
                names[f"{theirs}.{back[part]}.{kind}"] = value[..., None] if proj else value
        for fused, parts in (
            ("qkv", ("to_q", "to_k", "to_v")),
            ("encoder_kv", ("add_k_proj", "add_v_proj")),
        ):
            for kind in ("weight", "bias"):
                own = [state.get(f"{ours}.{part}.{kind}") for part in parts]
                if own[0] is not None:
                    heads = [w.reshape(-1, unet.attn_dim_head, *w.shape[1:]) for w in own]
                    joined = torch.stack(heads, 1).flatten(0, 2)
                    names[f"{theirs}.{fused}.{kind}"] = (
                        joined[..., None] if kind == "weight" else joined
                    )
    return names


@pytest.mark.parametrize("stage", [0, 1])
def test_the_original_layout(tmp_path, stage, command):
    unet, network = networks.CONFIG.unets[stage], networks.networks()[stage]
    state = original(unet, network.state_dict())
    torch.save(state, tmp_path / "pytorch_model.bin")
    size = networks.SIZES[stage]
    lines = dict(
        image_size=size,
        model_channels=unet.dim,
        channel_mult=",".join(map(str, unet.dim_mults)),
        num_res_blocks=",".join(map(str, unet.levels("num_resnet_blocks"))),
        attention_resolutions=str(size // 2),
        num_head_channels=unet.attn_dim_head,
        encoder_dim=unet.text_embed_dim,
        encoder_channels=unet.token_dim,
        att_pool_heads=unet.pool_heads,
        in_channels=3 * (1 + unet.lowres_cond),
        out_channels=6,
    )
    text = "params:\n" + "".join(f"  {name}: {value!r}\n" for name, value in lines.items())
    (tmp_path / "config.yml").write_text(text)
    read = deepfloyd.read(tmp_path)
    back = keys.to_torch(read.params, table=IF_UNET)
    for name, value in network.state_dict().items():
        np.testing.assert_array_equal(back[name], value.numpy())
    assert "of the largest output" in command("verify-if", tmp_path)
    state["input_blocks.0.9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="1 of .* tensors do not belong to a U-Net of DeepFloyd IF"):
        deepfloyd.read(tmp_path)


@pytest.mark.parametrize(
    "unet, diffusers_names, original_names",
    [(presets.IFStageI("XL"), 775, 643), (presets.IFStageII("L"), 939, 801)],
)
def test_both_layouts_have_as_many_tensors_as_published(unet, diffusers_names, original_names):
    shapes = keys.flatten(nn.abstract(unet)[1])
    state = keys.to_torch(
        {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes.items()},
        table=IF_UNET,
    )
    tensors = {name: torch.empty(array.shape, device="meta") for name, array in state.items()}
    assert len(tensors) == diffusers_names
    assert len(original(unet, tensors)) == original_names


def test_mistakes(folders, tmp_path, command):
    with pytest.raises(UserError, match="is not a folder of DeepFloyd IF"):
        deepfloyd.read(tmp_path)
    with pytest.raises(UserError, match="only the first folder can be a base"):
        command("from-diffusers", folders[1], folders[0], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    command("from-diffusers", folders[0], tmp_path / "run")
    shutil.copytree(folders[1], tmp_path / "run" / "second")
    with pytest.raises(UserError, match="run contains what is to be converted"):
        second = tmp_path / "run" / "second"
        command("from-diffusers", folders[0], second, tmp_path / "run", "--overwrite")
    folder = tmp_path / "other"
    shutil.copytree(folders[0], folder)
    networks.scheduler(0, variance_type="fixed_small").save_pretrained(folder / "scheduler")
    with pytest.raises(UserError, match="variance_type = 'fixed_small'; the network learns the"):
        deepfloyd.read(folder)
    described = json.loads((folders[0] / "unet" / "config.json").read_text())
    described["mid_block_type"] = "UNetMidBlock2DCrossAttn"
    (folder / "unet" / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="config.json: mid_block_type = 'UNetMidBlock2DCrossAttn'"):
        deepfloyd.read(folder)


@pytest.mark.slow
def test_verify_draws_a_picture(folders, command, tmp_path):
    """The same one for the same weights, of the size of the last stage, and no other prompt's."""
    t5 = T5EncoderModel(
        T5Config(
            d_model=networks.WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", vocab_size=32128,
        )
    )  # fmt: skip
    t5.save_pretrained(tmp_path / "t5")
    load_tokenizer().save(str(tmp_path / "t5" / "tokenizer.json"))
    drawn = {}
    for name, prompt in (("a", "a red cube"), ("b", "a red cube"), ("c", "two blue spheres")):
        out = tmp_path / f"{name}.png"
        words = ("--t5", tmp_path / "t5", "--prompt", prompt, "--out", out)
        assert f"{out}: {prompt}" in command("verify-if", *folders, *words)
        with Image.open(out) as picture:
            assert picture.size == (networks.SIZES[1],) * 2
            drawn[name] = np.asarray(picture)
    np.testing.assert_array_equal(drawn["a"], drawn["b"])
    assert np.std(drawn["a"]) > 5 and (drawn["a"] != drawn["c"]).any()
