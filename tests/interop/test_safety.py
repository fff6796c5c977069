"""Hostile and damaged input is refused in one line, and what stands at the target stays whole."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import commands
from imagen_jax import checkpoint, run_config
from imagen_jax.interop import imagen_pytorch, keys, verify
from imagen_jax.interop.torch_file import read_torch_file
from imagen_jax.text import Identity
from tests.interop import states
from tests.interop.states import contents, saved
from tests.interop.support import interop


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A folder with `imagen.pt`, the run directory `run` made of it, and `imagen.safetensors`."""
    folder = tmp_path_factory.mktemp("converted")
    saved(folder / "imagen.pt", states.trainers_file())
    interop("from-torch", folder / "imagen.pt", folder / "run")
    interop("to-safetensors", folder / "run", folder / "imagen.safetensors")
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """As `commands.run` does for a user; the hook is put back."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    commands.keep_writers_logs()


def refused(match: str, *arguments) -> str:
    """The command fails with one line."""
    with pytest.raises(ValueError, match=match) as caught:
        interop(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_the_code_of_a_malicious_pickle_does_not_run(tmp_path):
    mark, out = tmp_path / "mark", tmp_path / "out"
    file = saved(tmp_path / "evil.pt", states.trainers_file() | {"extra": Hostile(mark)})
    pickle.loads(pickle.dumps(Hostile(mark)))  # it would run where pickle is trusted
    mark.rmdir()
    done = subprocess.run(
        [sys.executable, "-m", "imagen_jax.interop", "from-torch", file, out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {file} could not be read as weights only")
    assert not mark.exists() and not out.exists()
    for arguments in (("inspect", file), ("verify", file, out)):
        refused("never executed", *arguments)
    assert not mark.exists()


def test_a_bare_malicious_pickle_does_not_run_either(tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "evil.pt"
    file.write_bytes(pickle.dumps({"model": Hostile(mark)}))
    refused("never executed", "from-torch", file, tmp_path / "out")
    torch.save({"model": Hostile(mark)}, file, _use_new_zipfile_serialization=False)
    refused("never executed", "from-torch", file, tmp_path / "out")
    assert not mark.exists() and list(tmp_path.iterdir()) == [file]


def nothing(path: Path) -> None:
    """A file that is not there."""


def text(path: Path) -> None:
    path.write_text("weights, honestly\n")


def saved_list(path: Path) -> None:
    torch.save([torch.zeros(2)], path)


def without_a_byte(path: Path) -> None:
    torch.save(states.trainers_file(), path)
    path.write_bytes(path.read_bytes()[:-1])


def bomb(path: Path) -> None:
    """Its tensors are zeros, compressed a thousandfold."""
    torch.save({"model": {"unets.0.x": torch.zeros(2**22)}}, path.with_suffix(".whole"))
    with (
        zipfile.ZipFile(path.with_suffix(".whole")) as whole,
        zipfile.ZipFile(path, "w") as archive,
    ):
        for name in whole.namelist():
            how = zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED
            archive.writestr(name, whole.read(name), how)
    path.with_suffix(".whole").unlink()
    assert path.stat().st_size < 100_000


def bombs_header(path: Path) -> None:
    """An entry, not compressed, whose header claims 3 GB."""
    torch.save({"model": {"unets.0.x": torch.zeros(4)}}, path)
    data = bytearray(path.read_bytes())
    header = data.rindex(b"PK\1\2", 0, data.rindex(b"data/0"))
    data[header + 20 : header + 28] = struct.pack("<II", 3 << 30, 3 << 30)
    path.write_bytes(data)


def stride_zero(path: Path) -> None:
    torch.save({"model": {"unets.0.x": torch.zeros(1).expand(1 << 40)}}, path)


def stride_zero_within_the_files_size(path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(9999), "unets.0.x": torch.zeros(1).expand(99)}}, path)


def itself(path: Path) -> None:
    inner = []
    inner.append(inner)
    torch.save({"model": inner}, path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (nothing, "does not exist"),
        (text, "could not be read as weights only"),
        (saved_list, "contains no dictionary"),
        (without_a_byte, "could not be read as weights only"),
        (bomb, r"data/0 claims 16,777,216 bytes out of [\d,]+ in a file"),
        (bombs_header, "claims 3,221,225,472 bytes"),
        (stride_zero, "claims more bytes than are stored"),
        (stride_zero_within_the_files_size, "claims more bytes than are stored"),
        (itself, "contain themselves"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_is_no_checkpoint_is_refused(make, reason, tmp_path):
    file = tmp_path / "imagen.pt"
    make(file)
    before = contents(tmp_path)
    refused(reason, "from-torch", file, tmp_path / "out")
    assert contents(tmp_path) == before


def test_safetensors_are_sent_to_their_own_commands(tmp_path):
    refused("use from-safetensors", "from-torch", tmp_path / "x.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(3).to(torch.float8_e4m3fn),
        torch.zeros(3, dtype=torch.complex64).conj(),
    ],
    ids=["sparse", "without data", "8 bits", "conjugate"],
)
def test_a_tensor_that_is_no_plain_array_is_refused(tensor, tmp_path):
    with pytest.raises(ValueError, match=r"x.pt: a tensor of shape \(3"):
        read_torch_file(saved(tmp_path / "x.pt", {"a": tensor}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"imagen_type": "improved"}, "imagen_type 'improved' is neither"),
        ({"imagen_params": [1]}, "imagen_params is list, not a dictionary"),
        ({"steps": torch.zeros(3, dtype=torch.int64)}, r"2 U-Nets and steps of shape \(3,\)"),
        ({"model": [torch.zeros(1)]}, "a dictionary of tensors was expected"),
    ],
    ids=["type", "configuration", "steps", "tensors"],
)
def test_an_entry_of_another_kind_is_named(change, reason, tmp_path):
    file = saved(tmp_path / "imagen.pt", states.trainers_file() | change)
    refused(reason, "from-torch", file, tmp_path / "out")


def test_all_that_does_not_fit_is_printed_together_and_nothing_is_written(tmp_path):
    data = states.trainers_file()
    model = data["model"]
    model["unets.0.mid_block1.time_mlp.2.bias"] = model.pop("unets.0.mid_block1.time_mlp.1.bias")
    model["unets.1.final_conv.weight"] = torch.zeros(4, 11, 3, 3)
    del model["unets.1.norm_cond.bias"]
    file = saved(tmp_path / "imagen.pt", data)
    with pytest.raises(keys.MisfitError) as caught:
        interop("from-torch", file, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"4 of {len(model)} tensors do not fit.\n")
    head, unknown, missing, *others = (line.split() for line in message.splitlines()[1:])
    assert head[:2] == ["tensor", "shape"]
    right, wrong = "mid_block1.time_mlp.1.bias", "mid_block1.time_mlp.2.bias"
    assert unknown == ["unknown", f"unets.0.{wrong}", "(16,)", right]
    assert missing == ["missing", f"unets.0.{right}", "(16,)", wrong]
    assert [row[:2] for row in others] == [
        ["missing", "unets.1.norm_cond.bias"],
        ["shape", "unets.1.final_conv.weight"],
    ]
    assert " ".join(others[1][2:]) == "(4, 11, 3, 3) (3, 11, 3, 3)"
    assert list(tmp_path.iterdir()) == [file]


def test_the_encoder_of_a_run_travels_in_safetensors(converted, tmp_path):
    recorded = Identity(name="t5", sha256="1" * 64)
    shutil.copytree(converted / "run", tmp_path / "run")
    run_config.write(tmp_path / "run", run_config.read(tmp_path / "run"), text_encoder=recorded)
    interop("to-safetensors", tmp_path / "run", tmp_path / "a.safetensors")
    interop("from-safetensors", tmp_path / "a.safetensors", tmp_path / "again")
    assert run_config.read_text_encoder(tmp_path / "again") == recorded


def test_a_file_says_what_the_run_is(converted, tmp_path):
    """Not what the file that it came from said, where that was corrected."""
    run, file = tmp_path / "run", tmp_path / "a.pt"
    shutil.copytree(converted / "run", run)
    before = torch.load(converted / "imagen.pt", weights_only=True)["imagen_params"]
    interop("to-torch", run, file)
    assert torch.load(file, weights_only=True)["imagen_params"] == before
    config = dataclasses.replace(run_config.read(run), pred_objectives="x_start")
    data = json.loads((run / "config.json").read_text()) | {"imagen": config.to_dict()}
    (run / "config.json").write_text(json.dumps(data))
    interop("to-torch", run, file, "--overwrite")
    assert imagen_pytorch.read(file).config == config


def test_overwrite_replaces_a_file_and_a_directory(converted, tmp_path):
    run, file, stored = tmp_path / "run", tmp_path / "a.pt", tmp_path / "a.safetensors"
    for _ in range(2):
        flags = ["--overwrite"] if file.exists() else []
        interop("to-torch", converted / "run", file, *flags)
        interop("from-torch", file, run, *flags)
        interop("to-safetensors", run, stored, *flags)
        interop("from-safetensors", stored, run, "--overwrite")
        assert {path.name for path in tmp_path.iterdir()} == {run.name, file.name, stored.name}
    other = saved(tmp_path / "other.pt", states.trainers_file(seed=7))
    with pytest.raises(ValueError, match="exists"):
        imagen_pytorch.save(file, checkpoint.load(run))
    old = (contents(run), file.read_bytes(), stored.read_bytes())
    interop("from-torch", other, run, "--overwrite")
    interop("to-torch", run, file, "--overwrite")
    interop("to-safetensors", run, stored, "--overwrite")
    new = (contents(run), file.read_bytes(), stored.read_bytes())
    assert all(a != b for a, b in zip(old, new, strict=True))
    back = torch.load(file, weights_only=True)["model"]
    for name, tensor in torch.load(other, weights_only=True)["model"].items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)


@pytest.fixture
def standing(converted, tmp_path) -> Path:
    """A run directory and files that are where something new is to go; and what is to go there."""
    shutil.copytree(converted / "run", tmp_path / "run")
    for name in ("imagen.pt", "imagen.safetensors"):
        (tmp_path / name).write_bytes(b"the old one")
        shutil.copy(converted / name, tmp_path / name.replace(".", "0."))
    saved(tmp_path / "new.pt", states.trainers_file(seed=7))
    return tmp_path


def inside(folder: Path, words: str) -> list[Any]:
    """A command, files and flags as the command line has them, in a folder."""
    command, *others = words.split()
    return [command, *(word if word.startswith("-") else folder / word for word in others)]


def test_a_failed_proof_leaves_the_old_one_whole(standing, monkeypatch):
    before = contents(standing)
    monkeypatch.setattr(verify, "differences", lambda *_: ["unets.0.final_conv.bias"])
    failure = r"verify \(a\), online: 1 of \d+ differ: unets.0.final_conv.bias"
    for words in ("from-torch new.pt run", "from-torch new.pt none", "to-torch run imagen.pt"):
        refused(failure, *inside(standing, words), "--overwrite", "--verify")
    assert contents(standing) == before


def second_stage_fails(path: Path, number: int) -> Path:
    if number == 2 and "partial" in str(path):
        assert any(Path(path).rglob("_METADATA"))  # the first is written
        raise FULL
    return STAGE_PATH(path, number)


def half(_, path, *__) -> None:
    Path(path).write_bytes(b"half")
    raise FULL


def cannot_rename(path: Path, to: Path) -> Path:
    if path.name.endswith(".partial"):
        raise FULL
    return RENAME(path, to)


FULL = OSError(28, "No space left on device")
STAGE_PATH, RENAME = checkpoint.stage_path, Path.rename
FAILING = {
    "from-torch new.pt run": (checkpoint, "stage_path", second_stage_fails),
    "to-torch run imagen.pt": (torch, "save", half),
    "to-safetensors run imagen.safetensors": (safetensors.numpy, "save_file", half),
    "from-torch imagen0.pt run": (Path, "rename", cannot_rename),
}


@pytest.mark.parametrize("words", FAILING)
def test_a_disk_that_fills_up_leaves_the_old_one_whole(words, standing, monkeypatch):
    before = contents(standing)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(*FAILING[words])
        interop(*inside(standing, words), "--overwrite")
    assert contents(standing) == before


EXISTS = "exists: choose another name, or replace it with --overwrite"
LINK, HOLDS = "is a symbolic link", "contains what is to be converted"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("from-torch new.pt run", EXISTS),
        ("to-torch run imagen.pt", EXISTS),
        ("to-safetensors run imagen.safetensors", EXISTS),
        ("from-safetensors imagen0.safetensors run", EXISTS),
        ("from-torch new.pt link", LINK),
        ("from-torch new.pt dangling", LINK),
        ("to-torch run link.pt", LINK),
        ("from-torch new.pt link --overwrite", LINK),
        ("from-torch new.pt dangling --overwrite", LINK),
        ("to-torch run link.pt --overwrite", LINK),
        ("from-torch new.pt pictures --overwrite", "is a directory without a config.json: it is"),
        ("to-torch other run --overwrite", "run is a directory: a file does not replace it"),
        ("from-torch new.pt imagen.pt --overwrite", "imagen.pt is a file: a directory does not"),
        ("from-torch run/inside.pt run --overwrite", HOLDS),
        ("from-torch run/inside.pt run/inside.pt --overwrite", HOLDS),
        ("to-torch run run --overwrite", HOLDS),
    ],
)
def test_what_is_in_the_way_is_kept(words, reason, standing):
    for name, to in (("link", "run"), ("dangling", "nowhere"), ("link.pt", "imagen.pt")):
        (standing / name).symlink_to(standing / to)
    shutil.copytree(standing / "run", standing / "other")
    (standing / "pictures").mkdir()
    (standing / "pictures" / "cat.png").write_bytes(b"cat")
    shutil.copy(standing / "new.pt", standing / "run" / "inside.pt")
    before = contents(standing)
    refused(reason, *inside(standing, words))
    assert contents(standing) == before


def test_what_a_link_inside_the_target_points_to_is_untouched(standing, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (standing / "run" / "unet1").rename(outside / "unet1")
    (standing / "run" / "unet1").symlink_to(outside / "unet1")
    before = contents(outside)
    interop("from-torch", standing / "new.pt", standing / "run", "--overwrite")
    assert contents(outside) == before
    assert not (standing / "run" / "unet1").is_symlink()


@pytest.mark.parametrize("damage", [lambda a: a[:-9], lambda a: b"\xff" * 8 + a[8:], lambda a: b""])
def test_a_damaged_safetensors_file_is_refused(damage, converted, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(damage((converted / "imagen.safetensors").read_bytes()))
    refused("is damaged, or not a safetensors file", "from-safetensors", file, tmp_path / "out")
    refused("is damaged, or not a safetensors file", "inspect", file)
    assert list(tmp_path.iterdir()) == [file]


def test_the_safetensors_file_of_another_program_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.numpy.save_file({"a": np.zeros(2)}, file, metadata)
        refused("was not written by imagen-jax", "from-safetensors", file, tmp_path / "out")
    safetensors.numpy.save_file({"a": np.zeros(2)}, file, {"format": "imagen-jax", "config": "{"})
    refused("its metadata are damaged", "from-safetensors", file, tmp_path / "out")
    refused("is not a file", "from-safetensors", tmp_path / "b.safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


def test_a_safetensors_file_whose_tensors_do_not_fit_is_refused(converted, tmp_path):
    file, path = tmp_path / "a.safetensors", converted / "imagen.safetensors"
    with safetensors.safe_open(path, "np") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["unets.0.final_conv.bias"] = np.zeros(4, np.float32)
    del tensors["unets.1.final_conv.bias"]
    safetensors.numpy.save_file(tensors, file, metadata)
    with pytest.raises(keys.MisfitError, match="^2 of ") as caught:
        interop("from-safetensors", file, tmp_path / "out")
    assert {(p.kind, p.name) for p in caught.value.problems} == {
        ("shape", "unets.0.final_conv.bias"),
        ("missing", "unets.1.final_conv.bias"),
    }
    assert list(tmp_path.iterdir()) == [file]


def config_missing(run: Path) -> None:
    (run / "config.json").unlink()


def config_of_text(run: Path) -> None:
    (run / "config.json").write_text("dim: 8")


def array_truncated(run: Path) -> None:
    chunk = max((run / "unet2").rglob("[0-9].*"), key=lambda path: path.stat().st_size)
    os.truncate(chunk, chunk.stat().st_size // 2)


def array_missing(run: Path) -> None:
    """Stores of arrays take a chunk that is not there for zeros, unless printed otherwise."""
    max((run / "unet2").rglob("[0-9].*"), key=lambda path: path.stat().st_size).unlink()


def other_architecture(run: Path) -> None:
    data = json.loads((run / "config.json").read_text())
    for unet in data["imagen"]["unets"]:
        unet["dim"] = 16
    (run / "config.json").write_text(json.dumps(data))


def no_second_unet(run: Path) -> None:
    (run / "unet2" / "0").rename(run / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (config_missing, "is not a run directory: it has no config.json"),
        (config_of_text, "is not JSON"),
        (array_truncated, "unet2/0/params is damaged"),
        (array_missing, "unet2/0/params is damaged"),
        (other_architecture, "tensors do not fit"),
        (no_second_unet, "has no weights of U-Net 2: train it first"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_run_directory_is_refused(damage, reason, standing):
    damage(standing / "run")
    before = contents(standing)
    for command, name in (("to-torch", "imagen.pt"), ("to-safetensors", "imagen.safetensors")):
        with pytest.raises(ValueError, match=reason) as caught:
            interop(command, standing / "run", standing / name, "--overwrite")
        assert "\n" not in str(caught.value) or isinstance(caught.value, keys.MisfitError)
    assert contents(standing) == before


def test_no_file_is_no_run_directory(converted, tmp_path):
    for path in (converted / "imagen.pt", tmp_path / "nowhere"):
        message = re.escape(f"{path} is not a run directory")
        refused(message, "to-torch", path, tmp_path / "out.pt")
    refused("holds no ema weights|no averaged", "from-torch", converted / "imagen.pt",
            tmp_path / "out", "--weights", "ema")  # fmt: skip
