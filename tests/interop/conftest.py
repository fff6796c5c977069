"""`verify` compiles quickly: its forwards run a few times on tiny networks."""

import jax
import pytest

from imagen_jax.interop import verify
from tests import RUN_ONCE


@pytest.fixture(autouse=True, scope="package")
def compile_quickly():
    forward = jax.jit(
        verify._forward.__wrapped__, static_argnames="unet", compiler_options=RUN_ONCE
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_forward", forward)
        yield
