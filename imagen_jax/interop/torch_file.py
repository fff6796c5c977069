"""Files of `torch.save` as NumPy arrays, and back. The library's only place for either."""

import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from imagen_jax.errors import UserError, first_line

_NEEDED = "needs torch (pip install -e '.[torch]')"


def read_torch_file(path: str | os.PathLike) -> Any:
    """The file's content, with its dictionaries and lists, and each tensor as a NumPy array.

    The arrays are views of the memory-mapped file, so that only those used are read. bfloat16
    becomes `ml_dtypes.bfloat16`. Nothing in the file is executed: only tensors and plain containers
    are read.

    Raises ValueError if torch is missing, or if the file is damaged or has anything else.
    """
    path = Path(path)
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a PyTorch file: reading it {_NEEDED}, or convert it to safetensors."
        ) from error
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if not path.is_file():
        raise UserError(f"{path} is a directory, not a file of torch.save.")
    size = path.stat().st_size
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path, size)
    try:
        # Files from before torch 1.6 are not zip archives and cannot be mapped.
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # pickle, zip and torch raise a dozen types for a bad file
        # Torch's advice to read the file in another way is not for untrusted files.
        own = re.search("WeightsUnpickler error: (.+)", str(error))
        raise UserError(
            f"{path} could not be read as weights only (damaged, or it contains Python objects, "
            f"which are never executed): {own[1] if own else first_line(error)}"
        ) from error
    try:
        return _to_numpy(data, torch, path)
    except RecursionError as error:
        raise UserError(f"{path} is damaged: its containers contain themselves.") from error


def read_script_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a TorchScript archive, by name. Its program is read but not run.

    Raises UserError if torch is missing, or if the file is not such an archive.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is not safetensors: reading a TorchScript file {_NEEDED}."
        ) from error
    try:
        with warnings.catch_warnings():  # the format is old, and so are the files
            warnings.filterwarnings("ignore", "`torch.jit.load`", DeprecationWarning)
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
    except RuntimeError as error:
        raise UserError(f"{path} is not a TorchScript file: {first_line(error)}") from error
    return {name: tensor.numpy() for name, tensor in state.items()}


def write_torch_file(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Writes nested dictionaries; NumPy arrays become tensors, and repeated ones share storage.

    Raises ValueError if torch is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"writing {path} {_NEEDED}.") from error
    with warnings.catch_warnings():  # JAX arrays are read-only, and only read here
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        torch.save(_to_tensors(content, torch, {}), path)


def _check_archive(path: Path, size: int) -> None:
    """torch stores tensors uncompressed. A compressed entry, or one that claims more bytes than the
    file has, is damage or a zip bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise UserError(
                f"{path} is not a torch.save file, or is damaged: its {entry.filename} claims "
                f"{entry.file_size:,} bytes out of {entry.compress_size:,} in a file of {size:,}."
            )


def _to_numpy(data: Any, torch: Any, path: Path) -> Any:
    if isinstance(data, torch.Tensor):
        kind = f"{path}: a tensor of shape {tuple(data.shape)} and type {data.dtype}"
        if data.layout != torch.strided or data.device.type != "cpu" or data.is_quantized:
            raise UserError(f"{kind} is not a plain array: it is sparse, quantized or empty.")
        if data.numel() * data.element_size() > data.untyped_storage().nbytes():
            raise UserError(f"{kind} claims more bytes than are stored for it.")
        data = data.detach()
        if data.dtype == torch.bfloat16:
            return data.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        try:
            return data.numpy()
        except (TypeError, RuntimeError) as error:  # 8-bit floats, and lazy conjugates
            raise UserError(f"{kind} cannot be converted: {error}.") from error
    if isinstance(data, dict):
        return {key: _to_numpy(value, torch, path) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_to_numpy(value, torch, path) for value in data]
    return data


def _to_tensors(data: Any, torch: Any, seen: dict[int, Any]) -> Any:
    if isinstance(data, dict):
        return {key: _to_tensors(value, torch, seen) for key, value in data.items()}
    if not isinstance(data, np.ndarray):
        return data
    if id(data) not in seen:
        if data.dtype == ml_dtypes.bfloat16:
            seen[id(data)] = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
        else:
            seen[id(data)] = torch.from_numpy(data)
    return seen[id(data)]
