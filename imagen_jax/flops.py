"""The FLOPs of a function, counted from its jaxpr, and the peak speeds of devices.

Counts matrix products and convolutions, with two operations per multiply-add, and multiplies the
body of a loop by its length. The compiled program's own count takes a loop body once, and leaves
out what runs in a library.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn
from jax.typing import DTypeLike

from imagen_jax.errors import UserError

PEAKS = {
    # Dense bfloat16 operations per second of one JAX device, without sparsity.
    "NVIDIA A100": 312e12,  # nvidia.com: A100 data sheet, BF16 Tensor Core
    "NVIDIA H100 PCIe": 756e12,  # nvidia.com: H100 data sheet, half of the figure with sparsity
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200": 989e12,  # nvidia.com: H200 data sheet
    "NVIDIA B200": 2250e12,  # nvidia.com: DGX B200 data sheet, 36 PFLOPS sparse BF16 / 16
    "NVIDIA L4": 121e12,  # nvidia.com: L4 data sheet
    "NVIDIA L40S": 362e12,  # nvidia.com: L40S data sheet
    "NVIDIA V100": 125e12,  # nvidia.com: V100 data sheet; float16, it has no bfloat16
    # cloud.google.com/tpu/docs: the page of each version, peak compute per chip.
    "TPU v2": 22.5e12,  # 45 per chip of two devices
    "TPU v3": 61.5e12,  # 123 per chip of two devices
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # 2307 per chip of two devices
}
"""Kinds of devices by the start of their `device_kind`; the longest match counts."""


def count(fn: Callable, *args: Any) -> int:
    """Floating-point operations of `fn(*args)`; arguments may be ShapeDtypeStructs.

    Loops must have a length known at tracing. A conditional counts as its most expensive branch.
    Raises ValueError for a loop that runs until a condition is met.
    """
    return count_traced(jax.make_jaxpr(fn)(*args).jaxpr)


def count_traced(jaxpr: Jaxpr) -> int:
    """`count` for a function that is already traced."""
    return _of_jaxpr(jaxpr)


def peak(device_kind: str, dtype: DTypeLike = "bfloat16") -> float | None:
    """Peak operations per second of a device in `dtype`; None where no figure is known: for a
    device that is not in `PEAKS`, and for any dtype but bfloat16."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return None
    known = [name for name in PEAKS if device_kind.startswith(name)]
    return PEAKS[max(known, key=len)] if known else None


def _of_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn) -> int:
    match equation.primitive.name:
        case "dot_general":
            return _of_product(equation)
        case "conv_general_dilated":
            return _of_convolution(equation)
        case "cond":
            return max(_of_jaxpr(branch.jaxpr) for branch in equation.params["branches"])
        case "scan":
            return equation.params["length"] * _of_jaxpr(equation.params["jaxpr"].jaxpr)
        case "pallas_call":
            steps = math.prod(equation.params["grid_mapping"].grid)
            return steps * sum(map(_of_jaxpr, _inner(equation)))
        case "dot_product_attention_fwd_wrapper" | "dot_product_attention_bwd_wrapper" as name:
            # cuDNN's: logits and output; then logits again, and four gradients
            (b, p, n, width), (_, m, *_) = (x.aval.shape for x in equation.invars[:2])
            return (2 if "fwd" in name else 5) * 2 * b * n * p * m * width
        case "while":
            inner = _inner(equation)
            if any(map(_of_jaxpr, inner)):
                raise UserError("a loop whose length is not known in advance cannot be counted.")
            return 0
        case _:
            return sum(map(_of_jaxpr, _inner(equation)))


def _of_product(equation: JaxprEqn) -> int:
    """Two operations per element of the result and of the contracted axes."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _of_convolution(equation: JaxprEqn) -> int:
    """Two operations per element of the result, input channel of its group and tap of the kernel.

    Taps on padding, or between the pixels of a dilated input, do not count.
    """
    numbers, params = equation.params["dimension_numbers"], equation.params
    lhs, rhs = (x.aval.shape for x in equation.invars)
    out = equation.outvars[0].aval.shape
    taps = 1
    for i, axis in enumerate(numbers.lhs_spec[2:]):
        taps *= _taps(
            lhs[axis],
            rhs[numbers.rhs_spec[2 + i]],
            out[numbers.out_spec[2 + i]],
            stride=params["window_strides"][i],
            before=params["padding"][i][0],
            spread=params["lhs_dilation"][i],
            dilation=params["rhs_dilation"][i],
        )
    channels = rhs[numbers.rhs_spec[1]]
    batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2 * batch * features * channels * taps


def _taps(
    size: int, kernel: int, out: int, *, stride: int, before: int, spread: int, dilation: int
) -> int:
    """Number of pairs of output and kernel positions, along one axis, that meet an input."""
    places = (o * stride + k * dilation - before for o in range(out) for k in range(kernel))
    return sum(p % spread == 0 and 0 <= p // spread < size for p in places)


def _inner(equation: JaxprEqn) -> list[Jaxpr]:
    """The jaxprs in an equation: of a jitted, rematerialised or custom-differentiated function."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if isinstance(part, Jaxpr):
                found.append(part)
    return found
