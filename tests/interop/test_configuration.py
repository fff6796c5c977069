"""Configurations: from imagen-pytorch's classes and files, and from tensors alone."""

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from imagen_jax import run_config
from imagen_jax.config import ElucidatedConfig, ImagenConfig, NullUnetConfig, UnetConfig
from imagen_jax.interop import configuration, imagen_pytorch, infer, keys
from imagen_jax.interop.reference import build_unet, import_imagen_pytorch
from tests.interop import states
from tests.interop.states import saved, shapes_of
from tests.interop.support import create, interop, lenient
from tests.nn.test_unet_parity import CASES

IGNORED = ("num_image_tokens", "out_dim", "layer_attns_add_text_cond", "dropout")
UNETS = {
    case.name: dataclasses.replace(case.config, channels_out=None)
    for case in CASES
    if case.name != "another first width, ignored fields"  # which would warn once more
} | {
    "presets' levels": UnetConfig(
        dim=8,
        cond_dim=12,
        num_resnet_blocks=(2, 3),
        dim_mults=(1, 4),
        layer_attns=(False, True),
        layer_cross_attns=(False, True),
        memory_efficient=True,
        text_embed_dim=20,
    ),
    "linear attention alone": UnetConfig(
        dim=8,
        dim_mults=(1, 2),
        init_dim=16,
        layer_attns=False,
        layer_cross_attns=False,
        attend_at_middle=False,
        use_linear_attn=True,
        attn_pool_text=False,
        attn_heads=3,
        attn_dim_head=6,
        ff_mult=1.7,
    ),
}
SKIP, CROSS = {"scale_skip_connection": True}, {"use_linear_cross_attn": False}
PICTURE, SELF = {"resize_mode": "nearest"}, {"self_cond": False}
OPEN = {
    "text": SKIP | CROSS,
    "super-resolution": SKIP | CROSS | PICTURE,
    "linear attention": SKIP | CROSS,
    "group norm": SKIP | CROSS | {"resnet_groups": 8},
    "unconditional": SKIP,
    "self-conditioning": SKIP | CROSS | SELF | PICTURE,
    "self-conditioning, none given": SKIP | CROSS | SELF | PICTURE,
    "no final block": SKIP | CROSS,
    "cross-embed down": SKIP | CROSS,
    "cross-embed down first": SKIP | CROSS,
    "no pool": SKIP | CROSS,
    "low resolution, no text given": SKIP | CROSS | SELF | PICTURE,
    "odd widths, three levels": SKIP | CROSS | PICTURE,
    "presets' levels": SKIP | CROSS,
    "linear attention alone": SKIP | {"attn_dim_head": 64, "attn_heads": 8},
}
"""What names and shapes leave open, with the reference's defaults."""


def effective(unet: UnetConfig) -> dict:
    """The fields as far as they have an effect, in one form."""
    fields = dataclasses.asdict(unet)
    fields |= dict(cond_dim=unet.token_dim, init_dim=unet.first_dim, channels_out=unet.out_channels)
    names = ("num_resnet_blocks", "layer_attns", "layer_attns_depth", "layer_cross_attns")
    for name in (*names, "use_linear_attn", "use_linear_cross_attn"):
        fields[name] = unet.levels(name)
    both = zip(fields["layer_cross_attns"], fields["use_linear_cross_attn"], strict=True)
    fields["layer_cross_attns"] = tuple(full or linear for full, linear in both)
    both = list(zip(fields["layer_attns"], fields["use_linear_attn"], strict=True))
    fields["use_linear_attn"] = tuple(linear and not full for full, linear in both)
    attends = [full or linear for full, linear in both]
    depths = zip(fields["layer_attns_depth"], attends, strict=True)
    fields["layer_attns_depth"] = tuple(depth if any_ else 1 for depth, any_ in depths)
    for name in ("init_cross_embed_kernel_sizes", "cross_embed_downsample_kernel_sizes"):
        fields[name] = tuple(sorted(fields[name]))
    uses_heads = any((*attends, *fields["layer_cross_attns"], unet.attend_at_middle))
    uses_heads |= unet.cond_on_text and unet.attn_pool_text
    without_effect = [
        *IGNORED,
        *(
            ["init_conv_kernel_size"]
            if unet.init_cross_embed
            else ["init_cross_embed_kernel_sizes"]
        ),
        *([] if unet.cross_embed_downsample else ["cross_embed_downsample_kernel_sizes"]),
        *([] if unet.attn_pool_text else ["attn_pool_num_latents"]),
        *([] if unet.attend_at_middle else ["layer_mid_attns_depth"]),
        *([] if unet.cond_on_text else ["text_embed_dim"]),
        *([] if unet.cond_images_channels else ["resize_mode"]),
        "ff_mult",  # several round to the same widths
        *([] if uses_heads else ["attn_heads", "attn_dim_head"]),
        *([] if any(fields["layer_cross_attns"]) else ["use_linear_cross_attn"]),
    ]
    return {name: value for name, value in fields.items() if name not in without_effect}


@pytest.mark.parametrize("name", UNETS)
def test_names_and_shapes_tell_all_but_what_is_listed_as_open(name):
    unet = UNETS[name]
    shapes = shapes_of(unet)
    _, left = infer.unet_fields(shapes, {})
    assert left == OPEN[name]
    given = {field: getattr(unet, field, 8) for field in left}
    fields, left = infer.unet_fields(shapes, given)
    assert left == {}
    fields |= given
    fields.pop("resnet_groups", None)
    inferred = UnetConfig(**fields)
    assert effective(inferred) == effective(unet)
    assert keys.target(inferred) == keys.target(unet)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("text", dict(use_linear_cross_attn=(False, True), scale_skip_connection=False)),
        ("super-resolution", dict(resize_mode="area", use_linear_cross_attn=True)),
        ("self-conditioning", dict(self_cond=False, cond_images_channels=3)),
        ("linear attention alone", dict(attn_heads=6, attn_dim_head=3)),
    ],
)
def test_what_is_open_leaves_no_trace_in_names_and_shapes(name, changes):
    """So that it must be asked for."""
    unet = UNETS[name]
    changed = dataclasses.replace(unet, **changes)
    for field in changes.keys() - {"cond_images_channels"}:
        assert field in OPEN[name] and effective(changed)[field] != effective(unet)[field]
    assert shapes_of(changed) == shapes_of(unet)


def test_defaults_are_those_of_the_constructors():
    module = import_imagen_pytorch()
    for ours, theirs in ((UnetConfig, module.Unet), (ImagenConfig, module.Imagen)):
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(theirs.__init__).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        for field in dataclasses.fields(ours):
            if field.name in defaults and field.name != "image_sizes":
                want = defaults.pop(field.name)
                assert field.default == (tuple(want) if isinstance(want, list) else want), field
        assert defaults.keys() <= {
            "resize_cond_video_frames",
            "temporal_downsample_factor",
            "resnet_groups",
        }
    own = inspect.signature(module.ElucidatedImagen.__init__).parameters
    ours = {field.name: field.default for field in dataclasses.fields(ElucidatedConfig)}
    for name in configuration.HYPER_PARAMETERS:
        assert ours.pop(name) == own[name].default
    assert ours == {"lowres_conditioning": "log_snr"}


@pytest.mark.parametrize("kind", ["original", "elucidated"])
def test_json_has_the_defaults_of_the_config_classes(kind):
    module = import_imagen_pytorch()
    theirs = {"original": module.ImagenConfig, "elucidated": module.ElucidatedImagenConfig}[kind]
    given = dict(unets=[dict(dim=8, dim_mults=[1, 2])], image_sizes=[8])
    with lenient():
        params = theirs(**given).model_dump()
    ours = configuration.to_ours(given, kind, ["rms"])
    printed = configuration.to_ours(params, kind, ["rms"])
    assert ours == printed
    assert ours.cond_drop_prob == 0.5
    assert (ours.unets[0].attn_dim_head, ours.unets[0].attn_heads) == (32, 16)
    plain = ImagenConfig.from_dict(given)
    assert plain.cond_drop_prob == 0.1
    assert (plain.unets[0].attn_dim_head, plain.unets[0].attn_heads) == (64, 8)
    assert configuration.is_complete(given) and not configuration.is_complete({"unets": []})


@pytest.fixture(scope="module")
def clis(tmp_path_factory) -> Path:
    """The CLI's `imagen_config.json` with small numbers, and a state dict of its cascade."""
    folder = tmp_path_factory.mktemp("cli")
    package = Path(import_imagen_pytorch().__file__).parent
    config = json.loads((package / "default_config.json").read_text())
    config["imagen"] |= dict(image_sizes=[8, 16, 32], random_crop_sizes=[None, 8, 16])
    for unet in config["imagen"]["unets"]:
        for name, value in unet.items():
            unet[name] = value[:2] if isinstance(value, list) else value
        unet |= dict(dim=8, num_resnet_blocks=1)
    (folder / "imagen_config.json").write_text(json.dumps(config))
    saved(folder / "imagen.pt", create(config["imagen"] | dict(text_embed_dim=1024)).state_dict())
    return folder


def test_the_clis_configuration_completes_a_state_dict(clis, tmp_path):
    arguments = (clis / "imagen.pt", tmp_path / "out", "--config", clis / "imagen_config.json")
    printed = interop("from-torch", *arguments)
    assert "3 U-Nets (8 -> 16 -> 32 pixels)" in printed and "weights online" in printed
    config = run_config.read(tmp_path / "out")
    assert (config.text_embed_dim, config.text_encoder_name) == (1024, "google/t5-v1_1-large")
    assert (config.timesteps, config.cond_drop_prob) == ((1024, 512, 512), 0.1)
    assert config.random_crop_sizes == (None, 8, 16)
    assert {(unet.attn_dim_head, unet.attn_heads) for unet in config.unets} == {(32, 8)}
    assert config.unets[0].layer_attns == (False, True)
    assert config.stage(3).process.schedule == "linear"


def asked(file: Path, *config: Path) -> dict:
    """The JSON that the error message asks for."""
    options = [part for path in config for part in ("--config", path)]
    with pytest.raises(ValueError, match="its tensors do not determine these fields") as caught:
        interop("inspect", file, *options)
    return json.loads(str(caught.value).partition("\n")[2])


def converts(file: Path, fields: dict) -> ImagenConfig:
    config = file.with_suffix(".json")
    config.write_text(json.dumps(fields))
    interop("from-torch", file, file.with_suffix(""), "--config", config)
    return run_config.read(file.with_suffix(""))


TEXT = dict(
    image_sizes=None,
    pred_objectives="noise",
    noise_schedules=["cosine"],
    text_encoder_name="google/t5-v1_1-base",
)


def test_a_persisted_base_needs_only_the_cascades_fields(tmp_path):
    build_unet(states.UNET).persist_to_file(tmp_path / "unet.pt")
    assert asked(tmp_path / "unet.pt") == TEXT
    config = converts(tmp_path / "unet.pt", TEXT | dict(image_sizes=[8], pred_objectives="v"))
    assert (config.image_sizes, config.pred_objectives) == ((8,), "v")
    assert effective(config.unets[0]) == effective(states.UNET)


def test_a_persisted_super_resolution_network_follows_a_null_unet(tmp_path):
    unet = dataclasses.replace(states.CASCADE.unets[1], scale_skip_connection=False)
    build_unet(unet).persist_to_file(tmp_path / "unet.pt")
    wanted = TEXT | dict(noise_schedules=["cosine", "cosine"])
    assert asked(tmp_path / "unet.pt") == wanted
    config = converts(tmp_path / "unet.pt", wanted | dict(image_sizes=[8, 16]))
    assert config.unets[0] == NullUnetConfig()
    assert effective(config.unets[1]) == effective(unet)


def test_what_a_persisted_network_knows_completes_a_whole_configuration(tmp_path):
    """The config classes' defaults are not put over what the file says."""
    unet = dataclasses.replace(states.UNET, scale_skip_connection=False, attn_heads=3)
    build_unet(unet).persist_to_file(tmp_path / "unet.pt")
    whole = dict(unets=dict(dim=8, dim_mults=[1]), image_sizes=[8])
    config = converts(tmp_path / "unet.pt", whole)
    assert effective(config.unets[0]) == effective(
        dataclasses.replace(unet, text_embed_dim=config.text_embed_dim)
    )


def test_the_state_dict_of_a_cascade_leaves_both_networks_fields_open(tmp_path):
    unet = dataclasses.replace(states.UNET, layer_cross_attns=True, cond_images_channels=3)
    cascade = dataclasses.replace(states.CASCADE, unets=(unet, states.UNET))
    file = saved(tmp_path / "imagen.pt", states.trainers_file(cascade)["model"])
    wanted = asked(file)
    assert wanted == TEXT | dict(
        noise_schedules=["cosine", "cosine"], unets=[SKIP | CROSS | PICTURE | SELF, SKIP]
    )
    (tmp_path / "part.json").write_text(json.dumps(dict(image_sizes=[5, 8], unets=[SELF, SKIP])))
    rest = asked(file, tmp_path / "part.json")
    assert rest["unets"] == [SKIP | CROSS | PICTURE, {}] and "image_sizes" not in rest
    config = converts(file, wanted | dict(image_sizes=[5, 8]))
    assert [effective(a) for a in config.unets] == [effective(a) for a in cascade.unets]
    wanted["unets"][0] |= dict(self_cond=True)
    del wanted["unets"][0]["resize_mode"]
    file = file.rename(tmp_path / "again.pt")
    config = converts(file, wanted | dict(image_sizes=[5, 8]))
    assert config.unets[0].self_cond and config.unets[0].cond_images_channels == 0


def test_elucidated_hyper_parameters_in_the_json_tell_the_kind(tmp_path):
    file = saved(tmp_path / "unet.pt", states.state_of(states.UNET))
    fields = dict(image_sizes=[8], text_encoder_name="ours", unets=[SKIP], sigma_max=40)
    assert converts(file, fields).elucidated == ElucidatedConfig(sigma_max=40)


def params(**changes) -> Callable[[dict], dict]:
    """A trainer's file with other `imagen_params`."""
    return lambda data: data | dict(imagen_params=data["imagen_params"] | changes)


def misspelt_unet(data: dict) -> dict:
    first, second = data["imagen_params"]["unets"]
    return params(unets=[first | dict(layer_atn="v"), second])(data)


VIDEO = "video cascade; only image cascades"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda _: {"layer.weight": torch.zeros(3)},
            "not the tensors of a Unet of imagen-pytorch 1.22 to 2.1",
        ),
        (
            lambda data: data["model"] | {"unets.0.downs.0.temporal_attn.x": torch.zeros(1)},
            r"video U-Net \(Unet3D\)",
        ),
        (params(video=True), VIDEO),
        (params(temporal_downsample_factor=[1, 2]), VIDEO),
        (params(pred_objective="v"), "no field 'pred_objective'; did you mean 'pred_objectives'"),
        (misspelt_unet, "no field 'layer_atn'; did you mean 'layer_attns'"),
    ],
    ids=["another", "Unet3D", "video", "temporal", "cascade's field", "U-Net's field"],
)
def test_weights_of_something_else_are_refused(change, reason, tmp_path):
    file = saved(tmp_path / "a.pt", change(states.trainers_file()))
    with pytest.raises(ValueError, match=reason) as caught:
        interop("from-torch", file, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_fields_of_video_that_change_nothing_are_passed_over(tmp_path):
    harmless = dict(video=False, temporal_downsample_factor=1, resize_cond_video_frames=True)
    file = saved(tmp_path / "c.pt", params(**harmless)(states.trainers_file()))
    assert imagen_pytorch.read(file).config == states.CASCADE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("dim: 8", "is not JSON"),
        ("[1]", "must contain a JSON object, not list"),
        ('{"imagen": 3}', "'imagen' is not a JSON object"),
        ('{"type": "video", "imagen": {}}', "type 'video' is neither"),
        ('{"unets": [{"dim": 8, "dim_mults": [1]}], "image_sizes": [8]}', "has 1 unets, the we"),
        (json.dumps(dict(unets=[SKIP])), "has 1 unets, the weights 2"),
        (json.dumps(dict(unets=SKIP)), "has 1 unets, the weights 2"),
    ],
)
def test_a_file_that_is_no_configuration_of_the_weights_is_refused(content, reason, tmp_path):
    file = saved(tmp_path / "a.pt", states.trainers_file()["model"])
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=reason) as caught:
        interop("inspect", file, "--config", tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_converted_is_named():
    """Images that are not square, in theirs; a network in no cascade; more schedules than stages,
    which theirs cuts; a parameter that is not in the table."""
    config = dataclasses.replace(states.CASCADE, image_sizes=((5, 10), (8, 16)))
    with pytest.raises(ValueError, match="U-Net 1 is 5 x 10: imagen-pytorch supports only square"):
        configuration.to_theirs(config)
    shapes = shapes_of(dataclasses.replace(states.UNET, channels=1, channels_out=3))
    assert shapes["final_conv.weight"][0] == 3
    with pytest.raises(ValueError, match="outputs 3, and its first convolution takes 1") as caught:
        infer.unet_fields(shapes, {})
    assert "\n" not in str(caught.value)
    kind, fields = configuration.to_theirs(states.CASCADE)
    fields["noise_schedules"] = ["cosine", "linear", "linear"]
    config = configuration.to_ours(fields, kind, ["rms", "rms"])
    assert config.noise_schedules == ("cosine", "linear")
    with pytest.raises(ValueError, match="noise_schedules = .* has 3 entries for 2 unets"):
        ImagenConfig.from_dict(config.to_dict() | dict(noise_schedules=fields["noise_schedules"]))
    with pytest.raises(ValueError, match="not in the table: final_conv.colour"):
        keys.to_torch({"final_conv": {"colour": np.zeros(3)}})
