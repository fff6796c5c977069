"""Compares running equal residual blocks one by one with a scan over their stacked parameters.

    python -m benchmarks.scan                       # compiles and runs both on this machine
    python -m benchmarks.scan --topology v5e:2x2    # compiles both for TPUs (libtpu, no TPU)

Eight blocks, as in the deepest level of the super-resolution U-Nets (`--dim` channels; the default
is a quarter of theirs, for a CPU), forward and backward, with every block recomputed.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from imagen_jax.nn.blocks import ResnetBlock
from tools import chips

COUNT, SIZE, BATCH, TIME_DIM = 8, 16, 4, 512
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="local", help="as in tools.plan")
    parser.add_argument("--dim", type=int, default=256)
    args = parser.parse_args()
    device = chips.devices(args.topology)[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    sharding = jax.sharding.SingleDeviceSharding(device)
    made = nnx.eval_shape(
        lambda: ResnetBlock(
            *[args.dim] * 2,
            time_cond_dim=TIME_DIM,
            use_gca=True,
            norm="rms",
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
    )
    graph, state = nnx.split(made)
    one = nnx.to_pure_dict(state)

    def block(x, params, t):
        return nnx.merge(graph, params)(x, t)

    block = jax.checkpoint(block, policy=jax.checkpoint_policies.nothing_saveable)

    def unrolled(stacked, x, t):
        for i in range(COUNT):
            x = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], stacked), t)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def scanned(stacked, x, t):
        x, _ = jax.lax.scan(lambda x, params: (block(x, params, t), None), x, stacked)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def shape(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    stacked = jax.tree.map(lambda leaf: shape((COUNT, *leaf.shape), leaf.dtype), one)
    x, t = shape((BATCH, SIZE, SIZE, args.dim), dtype), shape((BATCH, TIME_DIM), dtype)
    for name, fn in (("one by one", unrolled), ("scan", scanned)):
        began = time.perf_counter()
        compiled = jax.jit(jax.grad(fn)).trace(stacked, x, t).lower().compile()
        line = f"{name}: compiled in {time.perf_counter() - began:.1f} s"
        memory = compiled.memory_analysis()
        line += f", temporaries {memory.temp_size_in_bytes / 2**20:.0f} MiB"
        line += f", code {memory.generated_code_size_in_bytes / 2**20:.1f} MiB"
        if args.topology == "local":
            inputs = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), (stacked, x, t))
            line += f", a step {_seconds(compiled, inputs) * 1e3:.0f} ms"
        print(line, flush=True)


def _seconds(compiled, inputs) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
