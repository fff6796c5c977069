"""A file of `torch.save` as numpy arrays. The only place of the library that reads one."""

import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes


def read_torch_file(path: str | Path) -> Any:
    """What the file holds, dictionaries and lists kept, each tensor a numpy array.

    The arrays are views of the file (mapped into memory), so that reading one costs one and not
    the whole. bfloat16 comes as `ml_dtypes.bfloat16`. Nothing in the file is executed: only
    tensors and plain containers are read.

    Raises ValueError if torch is missing, or if the file is damaged or holds more than that.
    """
    path = Path(path)
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file: reading it needs torch (pip install 'imagen-jax[torch]'), "
            "or convert it to safetensors."
        ) from error

    # Files from before torch 1.6 are no zip archives and cannot be mapped.
    try:
        data = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist.") from error
    except Exception as error:  # pickle, zip and torch raise a dozen kinds for a bad file
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} could not be read as weights alone (damaged, or it holds Python objects, "
            f"which are never executed): {reason}"
        ) from error
    return _to_numpy(data, torch)


def _to_numpy(data: Any, torch: Any) -> Any:
    if isinstance(data, torch.Tensor):
        data = data.detach()
        if data.dtype == torch.bfloat16:
            return data.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return data.numpy()
    if isinstance(data, dict):
        return {key: _to_numpy(value, torch) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_to_numpy(value, torch) for value in data]
    return data
