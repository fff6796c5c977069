"""Measurements of speed and memory; the results are in README.md.

Processes share an accelerator, so none of them may preallocate its memory.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
