"""Every program is compiled quickly and runs slowly: these runs take a few steps."""

import pytest

from tests import RUN_ONCE
from train import step


@pytest.fixture(autouse=True, scope="package")
def compile_quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_compiler_options", lambda *_: RUN_ONCE)
        yield
