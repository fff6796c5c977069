"""Published numbers of accelerators, and the devices of a topology that need not exist here."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax

from imagen_jax import flops
from imagen_jax.errors import UserError, first_line

GiB, GB = 2**30, 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device's numbers, as its maker states them. Arithmetic is in `imagen_jax.flops.PEAKS`."""

    kind: str
    """The beginning of its `device_kind`; the longest that fits counts."""
    hbm: int
    """Bytes of memory."""
    hbm_bandwidth: float
    """Bytes per second between memory and chip."""
    link_bandwidth: float
    """Bytes per second that it sends to its neighbours, all links together, in one direction."""
    source: str

    @property
    def peak(self) -> float:
        """bfloat16 operations per second."""
        return flops.peak(self.kind)


# TPUs: docs.cloud.google.com/tpu/docs/<version>, read 2026-11. "Bidirectional ICI bandwidth per
# chip" counts both directions: halved here, which is also the all-reduce bandwidth per pod divided
# by its chips (v5e 51.2 TB/s / 256, v6e 102.4 TB/s / 256). GPUs: NVIDIA's data sheets; NVLink and
# PCIe are given there for both directions too.
CHIPS = [
    Chip("TPU v4", 32 * GiB, 1200e9, 1.1e15 / 4096, "32 GiB, 1200 GB/s, 1.1 PB/s / 4096"),
    Chip("TPU v5 lite", 16 * GiB, 819e9, 400e9 / 2, "16 GB, 819 GB/s, ICI 400 GB/s"),
    Chip("TPU v5", 95 * GiB, 2765e9, 1200e9 / 2, "95 GiB, 2765 GB/s, ICI 1200 GB/s"),
    Chip("TPU v6 lite", 32 * GiB, 1638e9, 800e9 / 2, "32 GB, 1638 GB/s, ICI 800 GB/s"),
    Chip("NVIDIA V100", 32 * GB, 900e9, 300e9 / 2, "32 GB SXM2, 900 GB/s, NVLink 300 GB/s"),
    Chip("NVIDIA A100", 80 * GB, 2039e9, 600e9 / 2, "80 GB SXM, 2039 GB/s, NVLink 600 GB/s"),
    Chip("NVIDIA A100-SXM4-40GB", 40 * GB, 1555e9, 600e9 / 2, "1555 GB/s, NVLink 600 GB/s"),
    Chip("NVIDIA A100-PCIE-40GB", 40 * GB, 1555e9, 64e9 / 2, "1555 GB/s, PCIe 64 GB/s"),
    Chip("NVIDIA H100", 80 * GB, 3350e9, 900e9 / 2, "80 GB SXM, 3350 GB/s, NVLink 900 GB/s"),
    Chip("NVIDIA H100 PCIe", 80 * GB, 2000e9, 128e9 / 2, "80 GB, 2 TB/s, PCIe 128 GB/s"),
    Chip("NVIDIA H100 NVL", 94 * GB, 3900e9, 600e9 / 2, "94 GB, 3.9 TB/s, NVLink 600 GB/s"),
    Chip("NVIDIA H200", 141 * GB, 4800e9, 900e9 / 2, "141 GB SXM, 4.8 TB/s, NVLink 900 GB/s"),
    Chip("NVIDIA L4", 24 * GB, 300e9, 64e9 / 2, "24 GB, 300 GB/s, PCIe 64 GB/s"),
    Chip("NVIDIA L40S", 48 * GB, 864e9, 64e9 / 2, "48 GB, 864 GB/s, PCIe 64 GB/s"),
    Chip("NVIDIA B200", 180 * GB, 8000e9, 1800e9 / 2, "180 GB, 8 TB/s, NVLink 1.8 TB/s"),
]

TPUS = ("v4", "v5e", "v5p", "v6e")

# Otherwise libtpu would ask a metadata server what it runs on, and refuse a second process; no
# device is used here.
_ENVIRONMENT = dict(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)


def devices(topology: str) -> Sequence[jax.Device]:
    """The devices of `v5e:16x16`, `cpu:8` (emulated) or `local` (those of this machine).

    Call it before anything else touches a device: for all but `local` JAX is set to run on the
    CPU. Raises ValueError for a topology that is not known or cannot be compiled for here.
    """
    if topology == "local":
        return jax.devices()
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if found is None or found[1] not in (*TPUS, "cpu", "gpu"):
        raise UserError(
            f"--topology {topology}: give {', '.join(TPUS)} with a shape, as v5e:16x16, or cpu:8 "
            "for emulated devices, or local for those of this machine."
        )
    name, shape = found.groups()
    if name == "gpu":
        raise UserError(
            f"--topology {topology}: JAX compiles for GPUs only on a machine that has them: run it "
            "there with --topology local. To see how arrays are split and what moves: --topology "
            "cpu:N --dtype bfloat16."
        )
    jax.config.update("jax_platforms", "cpu")
    if name == "cpu":
        count = math.prod(map(int, shape.split("x")))
        emulated = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {emulated}".strip()
        return jax.devices()[:count]
    return _tpus(name, shape, topology)


def chip(device: jax.Device) -> Chip | None:
    """The published numbers of a device; None for a CPU, and if they are not known here.

    For a GPU of this machine, the memory is what JAX may use (XLA_PYTHON_CLIENT_MEM_FRACTION).
    """
    fit = [c for c in CHIPS if device.device_kind.startswith(c.kind)]
    published = max(fit, key=lambda c: len(c.kind), default=None)
    if published is None or device.platform != "gpu":
        return published
    usable = (device.memory_stats() or {}).get("bytes_limit", published.hbm)
    return dataclasses.replace(published, hbm=usable)


def _tpus(name: str, shape: str, topology: str) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {topology} needs libtpu, the compiler for TPUs (Linux x86-64, 1.5 GB): "
            "pip install -e '.[tpu]'. Without it, --topology cpu:8 emulates devices."
        )
    from jax.experimental import topologies

    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # A v4 chip is two devices, unless its cores are joined.
    more = {"chip_config_name": "megacore"} if name == "v4" else {}
    if set(shape.split("x")) == {"1"}:  # one chip; hosts hold four by default
        more["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(f"{name}:{shape}", "tpu", **more).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"--topology {topology}: libtpu does not know this slice: {reason}"
        ) from error
