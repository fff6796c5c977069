"""How libtpu compiles FSDP on a torus: three convolutions with kernels split over all devices.

    python -m benchmarks.collectives --topology v5e:16x16    # libtpu, no TPU; a minute

Compiles the same step three times: with shardings only, leaving the collectives to XLA, on a mesh
with one axis for all devices or one for each dimension of the torus; and with the collectives
written by hand in `shard_map`, along one dimension of the torus after the other. At the least, each
kernel must be gathered once and its gradient scattered once, in bfloat16 (nothing is recomputed, so
XLA gathers once too).
"""

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax.compiling import compiler_options
from tools import chips, hlo, report

COUNT, SIZE, PICTURES = 3, 16, 8  # kernels; pixels; pictures on each device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:16x16", help="TPU slice with two dimensions")
    parser.add_argument("--channels", type=int, nargs="*", default=[512, 2048])
    args = parser.parse_args()
    devices = chips.devices(args.topology)
    torus = tuple(map(int, args.topology.partition(":")[2].split("x")))
    forms = {
        "XLA's, one axis": (_mesh((len(devices),), devices), P(None, None, "a"), False),
        "XLA's, an axis a dimension": (_mesh(torus, devices), P(None, None, "a", "b"), False),
        "by hand, an axis a dimension": (_mesh(torus, devices), P(None, None, "a", "b"), True),
    }
    for channels in args.channels:
        least = 2 * COUNT * 9 * channels**2 * 2 * (1 - 1 / len(devices))
        print(f"{channels} channels: a device must send {least / 1e6:.1f} MB")
        for name, (mesh, spec, by_hand) in forms.items():
            moved = report.moved(compiled(mesh, spec, channels, by_hand))
            sent = sum(one["sent"] for one in moved.values())
            kinds = ", ".join(f"{kind} {one['sent'] / 1e6:.1f}" for kind, one in moved.items())
            print(f"  {name}: {sent / 1e6:.1f} MB: {kinds}", flush=True)


def compiled(mesh, spec, channels: int, by_hand: bool) -> list[hlo.Collective]:
    split, rows = NamedSharding(mesh, spec), NamedSharding(mesh, P(mesh.axis_names))

    def loss(kernels, x):
        for kernel in kernels:
            kernel = kernel.astype(jnp.bfloat16)
            if by_hand:
                kernel = jax.lax.all_gather(kernel, "b", axis=3, tiled=True)
                kernel = jax.lax.all_gather(kernel, "a", axis=2, tiled=True)
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
            x = jnp.tanh(x) if by_hand else jax.lax.with_sharding_constraint(jnp.tanh(x), rows)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def step(kernels, x):
        gradients = jax.grad(loss)(kernels, x)
        if not by_hand:
            gradients = jax.lax.with_sharding_constraint(gradients, [split] * COUNT)
        return [kernel - 1e-3 * one for kernel, one in zip(kernels, gradients, strict=True)]

    if by_hand:
        specs = [spec] * COUNT
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(specs, rows.spec), out_specs=specs, check_vma=False
        )
    kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32, sharding=split)
    shape = (PICTURES * mesh.size, SIZE, SIZE, channels)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
    traced = jax.jit(step, donate_argnums=0, out_shardings=[split] * COUNT).trace(
        [kernel] * COUNT, x
    )
    options = compiler_options(mesh.devices.flat[0])
    text = traced.lower().compile(compiler_options=options).as_text()
    return hlo.collectives(text, mesh.size)


def _mesh(shape: tuple[int, ...], devices) -> jax.sharding.Mesh:
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=types, devices=devices)


if __name__ == "__main__":
    main()
