"""imagen-pytorch -> here -> imagen-pytorch, and safetensors, through the command line.

The U-Nets are those of the parity tests, so that together they use every field of `UnetConfig`.
Each file is written by the reference, as its users write them.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import pytest
import torch

from imagen_jax import checkpoint, unet_config
from imagen_jax.config import ElucidatedConfig, ImagenConfig, UnetConfig
from imagen_jax.interop import keys, reference
from imagen_jax.interop.configuration import HYPER_PARAMETERS, OURS
from imagen_jax.interop.run_dir import RunDir
from tests import parity
from tests.interop import states, support
from tests.nn.test_unet_parity import CASES as PARITY
from tests.nn.test_unet_parity import SMALL

ROOT = Path(__file__).parents[2]
TEXT = SMALL["text_embed_dim"]
UNETS = {case.name: SMALL | case.unet for case in PARITY}
NULL = "null"


@dataclasses.dataclass(frozen=True)
class Case:
    """A cascade, `unets` by their names in the parity tests, and the file that holds it."""

    name: str
    unets: tuple[str, ...]
    sizes: tuple[int, ...]
    file: Literal["trainer", "trainer without averages", "state dict", "unet"]
    fields: dict[str, Any]
    steps: tuple[int, ...] = (0, 0)
    elucidated: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def params(self) -> dict[str, Any]:
        """Arguments of the reference's config class, which takes no None as text_embed_dim, and
        gives every U-Net as many channels_out as channels."""
        unets = [
            {k: v for k, v in unet.items() if v is not None and k not in ("channels_out", "norm")}
            for unet in self.described
        ]
        return dict(unets=unets, image_sizes=list(self.sizes)) | self.fields

    @property
    def weights(self) -> list[str]:
        """What the file holds."""
        return ["ema", "online"] if self.file == "trainer" else ["online"]

    @property
    def described(self) -> list[dict[str, Any]]:
        return [{"is_null": True} if name == NULL else UNETS[name] for name in self.unets]

    @property
    def config(self) -> ImagenConfig:
        """What must come out, the defaults of the config class included."""
        fields = dict(cond_drop_prob=0.5) | self.fields
        if self.elucidated:
            names = [field.name for field in dataclasses.fields(ElucidatedConfig)]
            fields["elucidated"] = {name: fields.pop(name) for name in names if name in fields}
        data = dict(unets=self.described, image_sizes=self.sizes) | fields
        return ImagenConfig.from_dict(data)


CASES = [
    Case(
        "text",
        ("text", "super-resolution"),
        (8, 16),
        "trainer",
        dict(
            text_encoder_name="google/t5-v1_1-small",
            text_embed_dim=TEXT,
            timesteps=[5, 7],
            loss_type="huber",
            noise_schedules=["linear", "cosine"],
            pred_objectives=["noise", "v"],
            random_crop_sizes=[None, 8],
            lowres_noise_schedule="cosine",
            lowres_sample_noise_level=0.1,
            per_sample_random_aug_noise_level=True,
            dynamic_thresholding=[False, True],
            dynamic_thresholding_percentile=0.9,
            only_train_unet_number=2,
            min_snr_loss_weight=[True, False],
            min_snr_gamma=[4.0, 5.0],
        ),
        steps=(7, 123),
    ),
    Case(
        "unconditional",
        ("unconditional", "low resolution, no text given"),
        (8, 16),
        "trainer without averages",
        dict(condition_on_text=False, channels=1, auto_normalize_img=False, resize_mode="bilinear"),
        steps=(1000, 0),
    ),
    Case(
        "super-resolution only",
        (NULL, "self-conditioning, none given"),
        (8, 16),
        "trainer",
        dict(text_embed_dim=TEXT, cond_drop_prob=0.25),
        steps=(0, 5),
    ),
    Case(
        "elucidated",
        ("linear attention", "self-conditioning"),
        (8, 16),
        "trainer",
        dict(
            text_embed_dim=TEXT,
            num_sample_steps=[16, 24],
            sigma_min=0.004,
            sigma_max=[60, 70],
            sigma_data=0.25,
            rho=5,
            P_mean=[-1.0, -1.1],
            P_std=1.1,
            S_churn=60,
            S_tmin=0.1,
            S_tmax=40,
            S_noise=1.01,
        ),
        steps=(20, 30),
        elucidated=True,
    ),
    Case(
        "three stages in bfloat16",
        ("no final block", "another first width, ignored fields", "no pool"),
        (8, 16, 32),
        "trainer without averages",
        dict(text_embed_dim=TEXT),
        steps=(2, 0, 1),
        dtype=torch.bfloat16,
    ),
    Case(
        "the config of the CLI",
        ("cross-embed down", "cross-embed down first"),
        (8, 16),
        "state dict",
        dict(text_embed_dim=TEXT),
    ),
    Case("1.26", ("group norm",), (8,), "state dict", dict(text_embed_dim=TEXT), steps=(0,)),
    Case(
        "one U-Net",
        ("odd widths, three levels",),
        (8,),
        "unet",
        dict(
            text_encoder_name="t5-small",
            cond_drop_prob=0.2,
            text_embed_dim=TEXT,
            pred_objectives="x_start",
            noise_schedules="cosine",
        ),
        steps=(0,),
    ),
]

MARKS = {
    **dict.fromkeys(
        ("unconditional", "super-resolution only", "the config of the CLI"), [pytest.mark.long]
    ),
    **dict.fromkeys(("elucidated", "three stages in bfloat16"), [pytest.mark.slow]),
}


@pytest.fixture(autouse=True)
def ignored_fields_were_warned_of():
    ignored = set(unet_config._IGNORED)
    with mock.patch.object(unet_config, "_warned", ignored):
        yield


def test_the_cases_use_every_field():
    configs = [case.config for case in CASES]
    unets = [unet for config in configs for unet in config.unets if isinstance(unet, UnetConfig)]
    assert len(unets) >= 12
    elucidated = [config.elucidated for config in configs if config.elucidated]
    for kind, values in ((UnetConfig, unets), (ImagenConfig, configs)):
        for field in dataclasses.fields(kind):
            if kind is ImagenConfig and field.name in OURS:
                continue
            assert {getattr(value, field.name) for value in values} - {field.default}, field.name
    for field in dataclasses.fields(ElucidatedConfig):
        if field.name not in HYPER_PARAMETERS:  # ours alone
            continue
        assert {getattr(value, field.name) for value in elucidated} - {field.default}, field.name


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=MARKS.get(case.name, ())) for case in CASES],
)
def test_round_trip(case, tmp_path):
    source, *config = write(case, tmp_path)
    printed = support.interop("from-torch", source, tmp_path / "run", *config, "--verify")
    assert_verified(printed, case)
    assert ("lowres_conditioning" in printed) == case.elucidated
    run = RunDir.open(tmp_path / "run")
    assert run.config == case.config
    assert run.steps == dict(enumerate(case.steps, 1))

    printed = support.interop("to-torch", tmp_path / "run", tmp_path / "back.pt", "--verify")
    assert_verified(printed, case)
    assert printed.count("optimiser's state is not converted") == 1
    want, got = support.read(source), support.read(tmp_path / "back.pt")
    assert_same_file(got, want, case)
    assert_the_reference_builds(got, case)

    file, again = tmp_path / "weights.safetensors", tmp_path / "again"
    support.interop("to-safetensors", tmp_path / "run", file)
    support.interop("from-safetensors", file, again)
    copy, which = RunDir.open(again), case.weights[0]
    assert (copy.config, copy.steps, copy.origin) == (run.config, run.steps, run.origin)
    for number in run.steps:
        assert [copy.has(number, kind) for kind in case.weights] == [True, False][
            : len(case.weights)
        ]
        for was, now in zip(
            jax.tree.leaves(run.params(number, which)),
            jax.tree.leaves(copy.params(number, which)),
            strict=True,
        ):
            assert (was.dtype, was.shape, was.tobytes()) == (now.dtype, now.shape, now.tobytes())


def write(case: Case, folder: Path) -> tuple[Any, ...]:
    """The file, and the arguments that name the JSON beside it, where it needs one."""
    file, config = folder / "source.pt", folder / "config.json"
    if case.file.startswith("trainer"):
        imagen = support.create(case.params, elucidated=case.elucidated).to(case.dtype)
        trainer = support.trained(imagen, case.steps, use_ema="ema" in case.weights)
        with support.lenient():
            trainer.save(str(file), without_optim_and_sched=case.name == "unconditional")
        return (file,)
    unets = [reference.build_unet(unet) for unet in case.config.unets]
    for number, unet in enumerate(unets):
        parity.randomise(unet, support.SEED + number)
    if case.file == "unet":
        unets[0].persist_to_file(str(file))
        config.write_text(json.dumps(dict(image_sizes=case.sizes) | case.fields))
    else:
        states_of = enumerate(unet.state_dict() for unet in unets)
        torch.save({f"unets.{i}.{n}": a for i, state in states_of for n, a in state.items()}, file)
        config.write_text(json.dumps(dict(type="original", imagen=case.params, trainer={})))
    return file, "--config", config


def assert_verified(printed: str, case: Case) -> None:
    """(a) and (b) ran, for every U-Net and all the weights there are."""
    for which in case.weights:
        assert f"verify (a), {which}: all " in printed
        for number, name in enumerate(case.unets, 1):
            assert (f"verify (b), {which}, U-Net {number}: " in printed) == (name != NULL)


def assert_same_file(got: dict, want: dict, case: Case) -> None:
    """All that the reference wrote, but for its optimisers; what it did not write is made up."""
    assert got.keys() == {"model", "ema", "steps", "version", "imagen_type", "imagen_params"}
    model = want.get("model", want)
    if case.file == "unet":
        model = {f"unets.0.{name}": tensor for name, tensor in want["state_dict"].items()}
    support.assert_same_tensors(got["model"], model)
    assert any(tensor.dtype == case.dtype for tensor in got["model"].values())
    assert got["steps"].dtype == torch.int64 and got["steps"].tolist() == list(case.steps)
    if case.file.startswith("trainer"):
        for name in ("version", "imagen_type", "imagen_params"):
            assert json.dumps(got[name]) == json.dumps(want[name]), name
    if case.file == "trainer":
        support.assert_same_tensors(got["ema"], want["ema"])
        return
    averages = {}
    for i, step in enumerate(case.steps):
        averages |= {f"{i}.initted": torch.tensor(True), f"{i}.step": torch.tensor(step)}
        for name in (name for name in model if name.startswith(f"unets.{i}.")):
            rest = name.removeprefix(f"unets.{i}.")
            averages |= {
                f"{i}.{copy}.{rest}": model[name] for copy in ("online_model", "ema_model")
            }
    support.assert_same_tensors(got["ema"], averages)


def assert_the_reference_builds(got: dict, case: Case) -> None:
    """The configuration in a file of ours makes the networks that were there, for its own loader.

    It cannot build cross-embedding downsampling, nor the norm that it had before 2.0.
    """
    networks = [unet for unet in case.config.unets if isinstance(unet, UnetConfig)]
    if any(unet.cross_embed_downsample or unet.norm == "group" for unet in networks):
        return
    imagen = support.create(got["imagen_params"], elucidated=case.elucidated)
    with support.lenient():
        imagen.load_state_dict(got["model"])
    for unet, wanted in zip(imagen.unets, case.config.unets, strict=True):
        if isinstance(wanted, UnetConfig):
            names = unet._locals.keys() - {"channels_out"}  # None says the same as its channels
            wanted = {name: getattr(wanted, name) for name in names}
            built = {name: unet._locals[name] for name in wanted}
            assert json.loads(json.dumps(built)) == json.loads(json.dumps(wanted))


def test_one_set_of_weights_stands_for_both(tmp_path):
    config = states.CASCADE
    online, ema = ([states.params_of(u, 10 * k + i) for i, u in enumerate(config.unets)]
                   for k in (1, 2))  # fmt: skip
    trees = {i + 1: {"online": online[i], "ema": ema[i]} for i in range(2)}
    checkpoint.write(tmp_path / "run", config, trees, {1: 4, 2: 6})
    for which, kept in (("ema", ema), ("online", online)):
        file, run = tmp_path / f"{which}.pt", tmp_path / which
        support.interop("to-torch", tmp_path / "run", file, "--weights", which)
        got = support.read(file)
        assert got["steps"].tolist() == [4, 6]
        assert [got["ema"][f"{i}.step"].item() for i in range(2)] == [4, 6]
        for i, params in enumerate(kept):
            state = {n: torch.from_numpy(a.copy()) for n, a in keys.to_torch(params).items()}
            for tree, prefix in (
                (got["model"], f"unets.{i}."),
                (got["ema"], f"{i}.online_model."),
                (got["ema"], f"{i}.ema_model."),
            ):
                mine = {n.removeprefix(prefix): a for n, a in tree.items() if n.startswith(prefix)}
                support.assert_same_tensors(mine, state)
        support.interop("from-torch", file, run, "--weights", which)
        assert [RunDir.open(run).has(1, w) for w in ("ema", "online")] == [
            which == "ema", which == "online"
        ]  # fmt: skip


WITHOUT = """
import json, sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in ("torch", "torchvision", "imagen_pytorch", "tensorflow"):
            return None
        return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import imagen_jax
import commands
from imagen_jax.interop.__main__ import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["imagen_jax.interop", *arguments]
    commands.run(main)
imagen = imagen_jax.load(sys.argv[-1])
print([type(unet).__name__ for unet in imagen.unets], imagen.unets[0].null_text_hidden.sum())
sys.argv = ["imagen_jax.interop", "from-torch", "imagen.pt", "run"]
commands.run(main)
"""


def test_torch_is_needed_for_its_own_files_alone(tmp_path):
    config = states.CASCADE
    params = [states.params_of(unet, i) for i, unet in enumerate(config.unets)]
    trees = {i + 1: {"ema": tree} for i, tree in enumerate(params)}
    run, file, again = tmp_path / "run", tmp_path / "weights.safetensors", tmp_path / "again"
    checkpoint.write(run, config, trees, {1: 4, 2: 6})
    commands = [
        ["to-safetensors", run, file],
        ["from-safetensors", file, again],
        ["inspect", file],
        ["inspect", again],
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT, json.dumps(commands, default=str)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: imagen.pt is a PyTorch file: reading it needs torch (pip install -e "
        "'.[torch]'), or convert it to safetensors."
    ]
    assert done.stdout.count("U-Net 2, ema    step         6: ") == 2
    unets, total = done.stdout.splitlines()[-1].split("] ")
    assert unets == "['Unet', 'Unet'"
    assert float(total) == pytest.approx(params[0]["null_text_hidden"].sum(), abs=1e-5)


def test_without_imagen_pytorch_the_table_is_proved_and_the_forward_is_not(tmp_path, monkeypatch):
    file = states.saved(tmp_path / "imagen.pt", states.trainers_file())
    monkeypatch.setitem(sys.modules, "imagen_pytorch", None)
    reference.import_imagen_pytorch.cache_clear()
    printed = support.interop("from-torch", file, tmp_path / "run", "--verify")
    printed += support.interop("verify", file, tmp_path / "run")
    reference.import_imagen_pytorch.cache_clear()
    assert printed.count("verify (a), online: all ") == 2
    assert printed.count("verify (b) did not run: imagen-pytorch cannot be imported") == 2
    assert "make test-env" in printed and "verify (b), " not in printed
