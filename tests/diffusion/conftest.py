from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The reference's module of networks and diffusion."""
    import torch

    from imagen_jax.interop.reference import import_imagen_pytorch

    torch.set_num_threads(1)
    return import_imagen_pytorch().imagen_pytorch
