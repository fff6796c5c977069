"""Tests mirror the package; `tests.parity` serves those that compare with imagen-pytorch."""

from importlib.metadata import version

# Of every program of the tests, by `tests.conftest`: most run once or twice on tiny arrays, which
# XLA need not optimise. It compiles a U-Net's gradient in a third of the time; steps take 4 x as
# long. `jax.jit(f, compiler_options=OPTIMISED)` compiles as a user's process does.
XLA_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
OPTIMISED = {"xla_backend_optimization_level": 3}
if version("jaxlib") < "0.12":  # later ones have no other emitters
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True

SMALLEST_UNET = dict(
    dim=8,
    dim_mults=(1,),
    attn_dim_head=4,
    attn_heads=2,
    layer_attns=False,
    layer_cross_attns=False,
    attend_at_middle=False,
    attn_pool_text=False,
    init_cross_embed=False,
    init_conv_kernel_size=3,
    use_global_context_attn=False,
)
"""Fields of the smallest U-Net that listens to everything: for tests of what stands around it."""
