"""Tests mirror the package; `tests.parity` serves those that compare with imagen-pytorch."""

# `jax.jit(f, compiler_options=RUN_ONCE)`: for programs that run once or twice on tiny arrays XLA
# need not optimise. It compiles a U-Net's gradient in a third of the time; steps are 4 x slower.
RUN_ONCE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
