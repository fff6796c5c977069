"""Measurements of speed and memory; README.md has the results.

Processes share an accelerator: none of them may take its memory at once.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
