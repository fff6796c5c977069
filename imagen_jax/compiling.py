"""XLA options that make this project's programs faster, where the compiler supports them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

OPTIONS = {
    # XLA's own convolutions and products, and only the reductions of its YNN library: 10 % less
    # time per step on two cores (benchmarks/README.md).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
    # Otherwise libtpu gathers kernels with few input channels as sums of padded arrays, at twice
    # the bytes. With it the paper-sized base sends 13.8 GB per step on v5e:16x16, without it 15.9.
    "tpu": {"xla_tpu_prefer_async_allgather_to_allreduce": "true"},
}
SAMPLING_OPTIONS = {
    # If there are few rows, libtpu makes more by cutting each image into strips before every
    # convolution and joining them after it, which doubles the memory of the 256 -> 1024 stage
    # (benchmarks/README.md).
    "tpu": {
        "xla_tpu_run_space_to_batch": "false",
        "xla_tpu_run_space_to_batch_on_new_platforms": "false",
    },
}


@functools.cache
def compiler_options(device: jax.Device, *, sampling: bool = False) -> dict[str, Any] | None:
    """Options for a training step, or for denoising steps. They are experimental: None for a
    compiler that does not support them."""
    options = (SAMPLING_OPTIONS if sampling else OPTIONS).get(device.platform)
    if options is None:
        return None
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x).trace(one).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return None
    return options
