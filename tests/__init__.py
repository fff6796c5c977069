"""Tests mirror the package; `tests.parity` serves those that compare with imagen-pytorch."""

from importlib.metadata import version

# `jax.jit(f, compiler_options=RUN_ONCE)`: for programs that run once or twice on tiny arrays XLA
# need not optimise. It compiles a U-Net's gradient in a third of the time; steps are 4 x slower.
RUN_ONCE = {"xla_backend_optimization_level": 0}
if version("jaxlib") < "0.12":  # later ones have no other emitters
    RUN_ONCE["xla_cpu_use_fusion_emitters"] = False

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
