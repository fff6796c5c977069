"""What we write is what imagen-pytorch 2.1.0 loads: strictly, samples from and trains on."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import imagen_jax
from imagen_jax import checkpoint
from imagen_jax.config import ElucidatedConfig, ImagenConfig, NullUnetConfig, UnetConfig
from imagen_jax.interop import configuration, imagen_pytorch, keys, run_dir
from imagen_jax.interop.reference import import_imagen_pytorch
from imagen_jax.sharding import make_layout
from imagen_jax.types import Params
from tests import SMALLEST_UNET, cascades, parity
from tests.interop import states, support
from tests.train import support as training
from train import loop
from train.run import RunDir

STEPS = 3
IMAGEN = ImagenConfig(
    unets=(
        UnetConfig(**SMALLEST_UNET, cond_dim=6, max_text_len=6),
        UnetConfig(**SMALLEST_UNET, cond_dim=6, max_text_len=6, memory_efficient=True),
    ),
    image_sizes=(6, 8),
    text_embed_dim=cascades.WIDTH,
    timesteps=STEPS,
    cond_drop_prob=0.2,
    pred_objectives=("noise", "v"),
)
COUNTS = {1: 40, 2: 50}
FAILURES = ("Failed loading state dict", "different than target")
RANDOM = np.random.default_rng(5)
TEXT = dict(
    text_embeds=RANDOM.standard_normal((2, 5, cascades.WIDTH), np.float32),
    text_masks=np.arange(5) < np.array([[5], [2]]),
)
NOISES = [
    [RANDOM.standard_normal((2, size, size, 3), np.float32) for _ in range(STEPS + 1 + place)]
    for place, size in enumerate(IMAGEN.image_sizes)
]


def random_params(config: ImagenConfig, seed: int) -> list[Params]:
    trees = []
    for number, unet in enumerate(config.unets):
        if isinstance(unet, NullUnetConfig):
            trees.append({"dummy_parameter": np.zeros(1, np.float32)})
            continue
        theirs = parity.reference_unet(unet, seed + number)
        trees.append(parity.our_params(theirs, unet))
    return trees


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of ours, after training: averages and online weights differ."""
    path = tmp_path_factory.mktemp("run") / "run"
    online, ema = random_params(IMAGEN, 3), random_params(IMAGEN, 13)
    trees = {i + 1: {"online": online[i], "ema": ema[i]} for i in range(2)}
    checkpoint.write(path, IMAGEN, trees, COUNTS)
    return path


@pytest.fixture(scope="module")
def file(run) -> Path:
    path = run.parent / "imagen.pt"
    support.interop("to-torch", run, path)
    return path


@pytest.fixture(scope="module")
def pictures(run) -> dict[str, np.ndarray]:
    """What our own cascade draws with NOISES."""
    return {
        which: np.asarray(imagen_jax.load(run, weights=which).sample(draws=draws(), **TEXT))
        for which in ("ema", "online")
    }


def draws() -> list[np.ndarray]:
    """Of the second stage the first noise is of the picture from below, as it is enlarged."""
    return [np.stack(noises) for noises in NOISES]


def reference_picture(imagen: torch.nn.Module) -> np.ndarray:
    with support.lenient():
        out = cascades.reference_sample(imagen.eval(), NOISES, **TEXT)
    return cascades.to_numpy(out)


def states_of(run: Path, which: checkpoint.Weights) -> list[dict[str, np.ndarray]]:
    opened = run_dir.RunDir.open(run)
    return [keys.to_torch(opened.params(number, which)) for number in (1, 2)]


def assert_holds(unet: torch.nn.Module, state: dict[str, np.ndarray]) -> None:
    held = unet.state_dict()
    assert held.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(held[name].numpy(), array, err_msg=name)


@contextlib.contextmanager
def loading():
    """The reference prints and continues where it should fail."""
    with support.lenient() as printed:
        yield printed
    for failure in FAILURES:
        assert failure not in printed.getvalue()


@pytest.mark.parametrize("which", ["ema", "online"])
def test_load_imagen_from_checkpoint_samples_the_same_picture(run, file, pictures, which):
    load = import_imagen_pytorch().load_imagen_from_checkpoint
    with loading() as printed:
        imagen = load(file, load_ema_if_available=which == "ema")
    assert printed.getvalue().startswith("loaded EMA" if which == "ema" else "loading non-EMA")
    for unet, state in zip(imagen.unets, states_of(run, which), strict=True):
        assert_holds(unet, state)
    np.testing.assert_allclose(reference_picture(imagen), pictures[which], rtol=0, atol=1e-3)
    assert np.abs(pictures["ema"] - pictures["online"]).max() > 0.1


@pytest.fixture
def trainer(file) -> Any:
    """A trainer of the reference's, whose own weights were others, after `load`."""
    trainer = support.make_trainer(
        support.create(support.read(file)["imagen_params"], seed=support.SEED + 50)
    )
    trainer.verbose = True
    with loading() as printed:
        trainer.load(str(file), strict=True)
    trainer.verbose = False
    assert "checkpoint loaded from" in printed.getvalue()
    return trainer


def test_the_trainer_loads_all_of_it(run, trainer):
    assert trainer.steps.tolist() == list(COUNTS.values())
    online, ema = states_of(run, "online"), states_of(run, "ema")
    for number, mine in enumerate(trainer.ema_unets):
        assert_holds(trainer.imagen.unets[number], online[number])
        assert_holds(mine.online_model, online[number])
        assert_holds(mine.ema_model, ema[number])
        assert mine.initted.item() is True
        assert mine.step.item() == COUNTS[number + 1]


def test_what_the_trainer_hides_is_seen_here(file, tmp_path):
    data = support.read(file)
    del data["model"]["unets.0.final_conv.bias"]
    torch.save(data, tmp_path / "partial.pt")
    trainer = support.make_trainer(support.create(data["imagen_params"]))
    with pytest.raises(AssertionError, match="Failed loading state dict"), loading():
        trainer.load(str(tmp_path / "partial.pt"), strict=True)


def test_the_trainer_samples_and_trains_on(run, trainer, pictures):
    with support.lenient():
        out = cascades.reference_sample(trainer, NOISES, **TEXT)
    np.testing.assert_allclose(cascades.to_numpy(out), pictures["ema"], rtol=0, atol=1e-3)
    text = {name: torch.from_numpy(array) for name, array in TEXT.items()}
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with support.lenient():
        loss = trainer(images, unet_number=2, **text)
        trainer.update(unet_number=2)
    assert np.isfinite(loss)
    assert trainer.steps.tolist() == [COUNTS[1], COUNTS[2] + 1]
    before = states_of(run, "online")
    after = [parity.state_dict(unet) for unet in trainer.imagen.unets]
    changed = [
        {name for name in before[i] if not np.array_equal(before[i][name], after[i][name])}
        for i in (0, 1)
    ]
    assert not changed[0] and len(changed[1]) > 0.9 * len(before[1])


def test_a_loaded_cascade_is_saved_for_the_reference(run, tmp_path):
    """`imagen_jax.interop.imagen_pytorch.save`, from modules."""
    loaded = {which: imagen_jax.load(run, weights=which) for which in ("ema", "online")}
    path = tmp_path / "imagen.pt"
    imagen_pytorch.save(path, loaded["online"], ema=loaded["ema"], steps=[4, 5])
    load = import_imagen_pytorch().load_imagen_from_checkpoint
    for which in ("ema", "online"):
        with loading():
            imagen = load(path, load_ema_if_available=which == "ema")
        for unet, state in zip(imagen.unets, states_of(run, which), strict=True):
            assert_holds(unet, state)
    assert support.read(path)["steps"].tolist() == [4, 5]
    again = imagen_pytorch.load(path)
    for ours, theirs in zip(again.unets, loaded["ema"].unets, strict=True):
        assert ours.config == theirs.config
        jax.tree.map(np.testing.assert_array_equal, params_of(ours), params_of(theirs))


def params_of(unet: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.split(unet)[1])


OTHERS = {
    "elucidated": dataclasses.replace(
        IMAGEN, elucidated=ElucidatedConfig(sigma_max=(60, 70), rho=5, P_mean=-1.0)
    ),
    "super-resolution only": dataclasses.replace(
        IMAGEN, unets=(NullUnetConfig(), IMAGEN.unets[1]), pred_objectives="v"
    ),
    "unconditional": dataclasses.replace(
        IMAGEN, condition_on_text=False, channels=1, random_crop_sizes=(None, 4)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_cascades_load_too(name, tmp_path):
    config = OTHERS[name]
    params = {
        number: tree
        for number, tree in enumerate(random_params(config, 3), 1)
        if not isinstance(config.unets[number - 1], NullUnetConfig)
    }
    run, files = tmp_path / "run", [tmp_path / "command.pt", tmp_path / "function.pt"]
    checkpoint.write(run, config, {n: {"online": tree} for n, tree in params.items()}, COUNTS)
    support.interop("to-torch", run, files[0])
    imagen_pytorch.save(files[1], imagen_jax.load(run))
    module = import_imagen_pytorch()
    for file in files:
        with loading():
            imagen = module.load_imagen_from_checkpoint(file, load_ema_if_available=True)
            trainer = support.make_trainer(module.load_imagen_from_checkpoint(file, False))
            trainer.load(str(file), strict=True)
        for number, tree in params.items():
            assert_holds(imagen.unets[number - 1], keys.to_torch(tree))
            assert_holds(trainer.ema_unets[number - 1].online_model, keys.to_torch(tree))
    if name == "elucidated":
        assert isinstance(imagen, module.ElucidatedImagen)
        assert [(h.sigma_max, h.rho, h.P_mean) for h in imagen.hparams] == [
            (60, 5, -1),
            (70, 5, -1),
        ]


def test_each_device_of_a_mesh_gets_its_part(tmp_path):
    unet = UnetConfig(**SMALLEST_UNET | dict(dim=128), cond_dim=8, max_text_len=5)
    config = ImagenConfig(unets=unet, image_sizes=8, text_embed_dim=6)
    file = states.saved(tmp_path / "imagen.pt", states.trainers_file(config))
    mesh = make_layout("2x2", rows=2, devices=jax.devices()[:4]).mesh
    (unsharded,), (split,) = (imagen_pytorch.load(file, mesh=place).unets for place in (None, mesh))
    jax.tree.map(np.testing.assert_array_equal, params_of(unsharded), params_of(split))
    arrays = jax.tree.leaves(params_of(split))
    assert all(x.sharding.device_set == set(mesh.devices.flat) for x in arrays)
    assert {x.addressable_shards[0].data.size / x.size for x in arrays} == {1, 1 / 4}


def test_a_converted_run_trains_on_from_its_average(tmp_path, monkeypatch):
    """Also from bfloat16: the file's dtype is kept until training casts it."""
    params = configuration.to_theirs(training.CASCADE)[1]
    trainer = support.trained(support.create(params).bfloat16(), (4, 5))
    with support.lenient():
        trainer.save(str(tmp_path / "imagen.pt"))
    support.interop("from-torch", tmp_path / "imagen.pt", tmp_path / "converted")
    begun, begin = [], RunDir.begin

    def watched(*arguments, **named):
        found = begin(*arguments, **named)
        begun.append(jax.tree.map(np.array, (found.state.params, found.state.ema)))
        return found

    monkeypatch.setattr(RunDir, "begin", watched)
    settings = training.settings(tmp_path, init_from=tmp_path / "converted", steps=1)
    assert loop.run(settings, 1)
    ema = trainer.ema_unets[0].ema_model
    want = {name: tensor.float().numpy() for name, tensor in ema.state_dict().items()}
    for tree in begun[0]:
        got = keys.to_torch(tree)
        assert got.keys() == want.keys()
        for name, array in want.items():
            assert got[name].dtype == np.float32
            np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert checkpoint.latest_step(settings.run, 1) == 1
