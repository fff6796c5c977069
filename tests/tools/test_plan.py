"""Plans: what a compiled program moves and keeps, against numbers counted by hand; the command as
a user runs it, for a real TPU topology where libtpu is there and for emulated devices elsewhere."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import commands
from imagen_jax import text
from imagen_jax.sharding import make_layout
from tests.train import support
from tools import chips, hlo, plan, programs, report
from tools.hlo import Collective

ROOT = Path(__file__).parents[2]
P = jax.P
CHIP = chips.Chip("TPU v4", hbm=1000, hbm_bandwidth=100.0, link_bandwidth=10.0, source="made up")


def compiled(fn, *shapes, mesh="8x1", specs=(), out_specs=None, **options):
    """A function of what each device has, compiled for emulated devices; shapes are whole."""
    layout = make_layout(mesh, rows=8)
    mapped = jax.shard_map(
        fn, mesh=layout.mesh, in_specs=specs, out_specs=out_specs, check_vma=False
    )
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout.named(spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    executable = jax.jit(mapped, **options).trace(*shapes).lower().compile()
    return executable, hlo.collectives(executable.as_text(), layout.mesh.size)


def by_kind(found: list[Collective]) -> dict[str, tuple[int, int, float]]:
    """kind -> (runs, group, bytes sent), for programs with one collective of a kind."""
    return {one.kind: (one.times, one.group, one.sent) for one in found}


def test_an_fsdp_step_by_hand():
    """Kernel (64, 32) split over 8 devices, 16 rows: gathered whole, its gradient scattered."""
    kernel = 64 * 32 * 4

    def step(w, x):
        whole = jax.lax.all_gather(w, "data", tiled=True)
        grads = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(whole)
        return w - jax.lax.psum_scatter(grads, "data", tiled=True)

    executable, found = compiled(
        step, (64, 32), (16, 64), specs=(P("data"), P("data")), out_specs=P("data"),
        donate_argnums=0,
    )  # fmt: skip
    sent = kernel * 7 / 8
    assert by_kind(found) == {"all-gather": (1, 8, sent), "reduce-scatter": (1, 8, sent)}
    memory = report.Memory.of(executable)
    own = kernel // 8
    assert (memory.arguments, memory.outputs, memory.aliased) == (own + 2 * 64 * 4, own, own)
    assert memory.temporaries >= kernel  # the whole kernel lives for a while
    assert memory.total == memory.arguments + memory.temporaries + memory.code


def test_the_partitioner_s_fsdp_step_by_hand():
    """The same, with shardings said and collectives left to XLA: the kernel is gathered for the
    forward pass, and its gradient, (64, 32), summed over the devices."""
    layout = make_layout("8x1", rows=8)
    split = layout.named(P("data"))

    def step(w, x):
        grads = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)
        return w - jax.lax.with_sharding_constraint(grads, split)

    shapes = (jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((4096, 64), "f4"))
    lowered = jax.jit(step, in_shardings=(split, split), out_shardings=split).lower(*shapes)
    found = hlo.collectives(lowered.compile().as_text(), 8)
    moved, kernel = report.moved(found), 64 * 32 * 4
    assert moved["all-gather"] == {"runs": 1, "sent": kernel * 7 / 8}
    reduced = moved.get("reduce-scatter") or moved["all-reduce"]
    assert reduced["sent"] == kernel * 7 / 8 * (1 if "reduce-scatter" in moved else 2)
    assert set(moved) <= {"all-gather", "reduce-scatter", "all-reduce"}


def test_the_other_kinds_by_hand():
    def step(x):
        x = jax.lax.psum(x, "model")
        x = jax.lax.all_to_all(x, "data", 1, 1, tiled=True)
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    _, found = compiled(step, (8, 16), mesh="2x4", specs=(P("data"),), out_specs=P("data"))
    own = 4 * 16 * 4
    assert by_kind(found) == {
        "all-reduce": (1, 4, 2 * own * 3 / 4),
        "all-to-all": (1, 2, own / 2),
        "collective-permute": (1, 2 * 4, own),
    }


def test_loops_multiply():
    def twice(x, _):
        def inner(x, _):
            return jax.lax.psum(jnp.sin(x), "data"), None

        return jax.lax.scan(inner, x, None, length=3)[0] * 0.5, None

    def fixed(x):
        return jax.lax.scan(twice, x, None, length=5)[0]

    def open_ended(x):
        steps = jnp.int32(jnp.abs(x[0, 0]) * 10)
        return jax.lax.fori_loop(0, steps, lambda _, x: jax.lax.psum(jnp.sin(x), "data"), x)

    told = dict(specs=(P("data"),), out_specs=P("data"))
    _, found = compiled(fixed, (8, 4), **told)
    assert by_kind(found)["all-reduce"] == (15, 8, 15 * 2 * 16 * 7 / 8)
    _, found = compiled(open_ended, (8, 4), **told)
    assert by_kind(found)["all-reduce"][0] == 1


LIBTPU = """HloModule jit_step, is_scheduled=true

%start (p.0: bf16[16,64]) -> (bf16[16,64], bf16[64,64]) {
  %all-gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=4, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, frontend_attributes={chain_id="1"}
}

%done (p.1: bf16[16,64]) -> bf16[64,64] {
  %all-gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=4, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, frontend_attributes={chain_id="1"}
}

%all-reduce-scatter.clone (input: bf16[64,64]) -> bf16[16,64] {
  %all-reduce.2 = bf16[64,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=12, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[16,64]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.2, %offset)
}

%condition (p.2: (s32[], bf16[16,64])) -> pred[] {
  %constant.29.clone.2 = s32[]{:T(128)} constant(4)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.6 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.29.clone.2), direction=LT
}

%body (p.3: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %fusion.1 = (bf16[16,64]{1,0}, bf16[64,64]{1,0}) fusion(%x), kind=kLoop, calls=%start
  %fusion.2 = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%y), kind=kLoop, calls=%done
  %fusion.3 = bf16[16,64]{1,0:T(8,128)(2,1)} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.clone
}

ENTRY %main (p.4: bf16[16,64]) -> bf16[16,64] {
  %while.1 = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) while(%tuple), condition=%condition, body=%body
  %dot.1 = f32[128,64]{1,0:T(8,128)} convolution(%a, %b), metadata={op_name="jit(step)/dot_general"}
}
"""  # noqa: E501


def test_what_libtpu_writes():
    """An overlapped gather stands there twice, a reduce-scatter is a fusion with an all-reduce,
    and the length of a loop stands in its condition."""
    complete = 64 * 64 * 2
    assert by_kind(hlo.collectives(LIBTPU, 4)) == {
        "all-gather": (4, 4, 4 * complete * 3 / 4),
        "reduce-scatter": (4, 4, 4 * complete * 3 / 4),
    }


def test_a_loop_that_goes_up_by_more_than_one():
    """A product in windows, as XLA overlaps it with a gather: the counter goes 0, 2, 4, 6 of 7."""
    text = """%cond (p.1: (bf16[8,16], u32[])) -> pred[] {
  %seven = u32[]{:T(128)} constant(7)
  %count.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  ROOT %less = pred[]{:T(512)} compare(%count.1, %seven), direction=LT
}

%body (p.2: (bf16[8,16], u32[])) -> (bf16[8,16], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %count.2 = u32[]{:T(128)} get-tuple-element(%p.2), index=1
  %sent = bf16[8,16]{1,0} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %next = u32[]{:T(128)} add(%count.2, %two)
  ROOT %result = (bf16[8,16]{1,0}, u32[]) tuple(%sent, %next)
}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  %while = (bf16[8,16]{1,0}, u32[]) while(%start), condition=%cond, body=%body
}
"""
    (one,) = hlo.collectives(text, 2)
    assert (one.times, one.sent) == (4, 4 * 8 * 16 * 2)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("{}", 8),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
    ],
)
def test_groups(groups, size):
    line = f"  %r = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{line}\n}}\n"
    (one,) = hlo.collectives(text, 8)
    assert one == Collective("all-reduce", 32, size, 1)


def test_asynchronous_forms():
    text = """ENTRY %main (x: f32[2]) -> f32[8] {
  %g = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4]
  %h = f32[8]{0} all-gather-done(%g)
  %p = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=2
  %s = (s4[6]{0}, f8e4m3fn[2]{0}) all-to-all(%a, %b), channel_id=3, replica_groups=[1,4]<=[4]
}
"""
    found = {one.kind: one.payload for one in hlo.collectives(text, 4)}
    assert found == {"all-gather": 32, "collective-permute": 8, "all-to-all": 3 + 2}


def test_the_roofline_by_hand():
    memory = report.Memory(arguments=300, outputs=200, aliased=200, temporaries=500, code=50)
    bound = report.Bound(compute=6.0, memory=5.0, network=8.0, model=3.0)
    assert (bound.overlapped, bound.in_turn) == (8, 14)
    assert bound.utilisation == (3 / 14, 3 / 8)
    assert bound.network_share == 8 / 14
    shown = "\n".join(report.describe_memory(memory, {"parameters": 300}, CHIP))
    assert "fits: 85.0%" in shown


def device(kind: str, memory: dict | None = None) -> mock.Mock:
    platform = "gpu" if kind.startswith("NVIDIA") else "tpu"
    found = mock.Mock(spec=jax.Device, device_kind=kind, platform=platform)
    found.memory_stats = lambda: memory
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU v5", "TPU v5"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
    ],
)
def test_the_longest_beginning_of_a_device_s_name_counts(name, kind):
    assert chips.chip(device(name)).kind == kind


def test_a_gpu_s_memory_is_what_jax_may_use():
    assert chips.chip(device("NVIDIA L4", {"bytes_limit": 17 * 10**9})).hbm == 17 * 10**9
    assert chips.chip(device("NVIDIA L4")).hbm == 24e9
    assert chips.chip(device("NVIDIA T4")) is None


def test_advice_follows_what_dominates():
    flags = dict(mesh=(8, 1), rows=64, dtype="bfloat16", remat=None, accumulate=1,
                 optimizer="adam", moments="float32")  # fmt: skip
    memory = report.Memory(arguments=100, outputs=0, aliased=0, temporaries=5000, code=0)
    told = "\n".join(report.advice(memory, {"parameters": 60, "optimiser": 40}, CHIP, flags))
    assert told.startswith("most of it is temporaries of the call")
    assert "--remat nothing_saveable" in told and "--accumulate 2" in told
    told = "\n".join(report.advice(memory, {"parameters": 6000, "optimiser": 12000}, CHIP, flags))
    assert told.startswith("most of it is optimiser")
    assert "--moments bfloat16" in told and "--mesh 16x1" in told


# ---- the command


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/plan.py", *map(str, arguments)])
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the command adds to it
    monkeypatch.setattr(commands, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(commands, "keep_writers_logs", list)
    commands.run(plan.main)


@pytest.fixture
def cascade(tmp_path):
    return support.settings(tmp_path).config


def test_a_train_step_on_emulated_devices(monkeypatch, capsys, tmp_path, cascade):
    out = tmp_path / "plan.json"
    flags = ("--topology", "cpu:8", "--mesh", "4x2", "--batch-size", 8, "--out", out)
    run(monkeypatch, "--config", cascade, *flags)
    found, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert found["devices"] == "8 x cpu, mesh 4x2, 1 process"
    # A CPU pads nothing; the key is two words, the step one.
    parts = found["argument_parts"]
    assert parts["optimiser"] - 2 * parts["parameters"] < 100
    assert found["memory"]["arguments"] - sum(parts.values()) in range(0, 20)
    assert found["memory"]["aliased"] >= 4 * parts["parameters"]
    assert found["collectives"]["all-reduce"]["sent"] > 0
    assert found["program_flops"] >= found["model_flops"] > 0
    for line in (
        "training step of U-Net 1, 8 images, float32",
        "FLOP for the model",
        "published numbers of these devices are not in tools/chips.py",
        "not counted: the text encoder",
    ):
        assert line in shown


def test_a_sampling_step(monkeypatch, capsys, cascade):
    flags = ("--topology", "cpu:8", "--mesh", "8x1", "--batch-size", 8, "--sample")
    run(monkeypatch, "--config", cascade, "--unet-number", "2", *flags)
    shown = capsys.readouterr().out
    assert "sampling step of U-Net 2, 8 images, guided" in shown
    assert "arithmetic per denoising step" in shown and "not counted" not in shown


def test_text_encoding(monkeypatch, capsys):
    monkeypatch.setattr(programs, "T5_XXL", text.encoder.DEMO_CONFIG)
    run(monkeypatch, "--topology", "cpu:8", "--mesh", "8x1", "--batch-size", 8, "--text")
    shown = capsys.readouterr().out
    assert "T5-XXL, 8 captions of 256 tokens" in shown and "all-gather" in shown


def test_t5_xxl_is_the_published_size():
    shapes = jax.tree.leaves(text.t5.abstract_encoder(programs.T5_XXL)[1])
    assert sum(math.prod(x.shape) for x in shapes) == 4_762_310_656


def test_what_does_not_fit_is_told(monkeypatch, capsys, tmp_path, cascade):
    monkeypatch.setattr(chips, "chip", lambda device: CHIP)
    out = tmp_path / "plan.json"
    flags = ("--topology", "cpu:8", "--mesh", "8x1", "--batch-size", 8, "--text", "--out", out)
    monkeypatch.setattr(programs, "T5_XXL", text.encoder.DEMO_CONFIG)
    with pytest.raises(SystemExit, match="error: it does not fit"):
        run(monkeypatch, "--config", cascade, *flags)
    shown = capsys.readouterr().out
    assert "does not fit: " in shown and "most of it is" in shown
    assert json.loads(out.read_text())["fits"] is False


def test_a_compiler_that_finds_no_room(monkeypatch, capsys):
    """libtpu refuses what does not fit: then the trace says what is large."""
    layout = make_layout("8x1", rows=8)
    planned = programs.text_encoding(8, 16, jnp.float32, layout)

    class Refused:
        jaxpr = planned.traced.jaxpr

        def lower(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")

    monkeypatch.setattr(programs, "T5_XXL", text.encoder.DEMO_CONFIG)
    planned = dataclasses.replace(planned, traced=Refused())
    told = dict(mesh=(8, 1), rows=8, dtype="float32")
    assert plan.compiled(planned, layout, CHIP, told)["fits"] is False
    shown = capsys.readouterr().out
    assert "the compiler: RESOURCE_EXHAUSTED: Ran out of memory on HBM" in shown
    assert "float32[8,16,10240]" in shown and "parameters" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--topology", "v9:2x2"), "--topology v9:2x2: give v4, v5e, v5p, v6e with a shape"),
        (("--topology", "v5e"), "--topology v5e: give"),
        (("--topology", "gpu:8"), "JAX compiles for GPUs only on a machine that has them"),
        (("--topology", "cpu:8", "--mesh", "16x1"), "16x1 needs 8 devices|needs 16 devices"),
        (("--sample", "--text"), "--sample and --text: give only one of them"),
        (("--topology", "cpu:8", "--unet-number", "7"), "the cascade has no such U-Net"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, flags, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "--preset", "tiny", *flags)


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    with pytest.raises(SystemExit, match=r"needs libtpu.*pip install -e '.\[tpu\]'"):
        run(monkeypatch, "--preset", "tiny", "--topology", "v5e:2x2")


def test_the_command_for_a_real_slice_where_libtpu_is(tmp_path, cascade):
    """v5e:2x2 if libtpu is installed; without it the same command on four emulated devices."""
    tpu = importlib.util.find_spec("libtpu") is not None
    out, topology = tmp_path / "plan.json", "v5e:2x2" if tpu else "cpu:4"
    flags = ["--config", cascade, "--topology", topology, "--batch-size", "8", "--out", out]
    done = subprocess.run(
        [sys.executable, "-m", "tools.plan", *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["devices"] == f"4 x {'TPU v5 lite' if tpu else 'cpu'}, mesh 4x1, 1 process"
    assert found["fits"] is (True if tpu else None)  # a CPU has no memory of its own
    assert found["memory"]["total"] > sum(found["argument_parts"].values())
    assert ("utilisation" in found) == tpu
    assert found["collectives"]["all-reduce"]["sent"] > 0
