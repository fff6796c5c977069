"""Shows, before you rent devices, whether a run fits on them and how fast it could be.

    python -m tools.plan --preset imagen --topology v5e:16x16 --mesh 256x1 --batch-size 2048 \\
        --remat nothing_saveable                       # the base's train step on 256 TPU chips
    python -m tools.plan --topology cpu:8 --mesh 4x2   # eight emulated devices
    python -m tools.plan --topology v5e:2x2 --sample   # a denoising step instead
    python -m tools.plan --topology v5e:2x2 --text     # T5-XXL instead

Compiles the real program ahead of time, runs nothing and needs none of the devices; for TPUs it
needs libtpu (the `tpu` extra). Takes every flag of `train.base`, so you can plan a run with its own
command line. The paper-sized base took 22 minutes and 15 GiB to compile for 256 chips, on one core.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import commands
from imagen_jax.config import NullUnetConfig
from imagen_jax.errors import UserError, first_line
from imagen_jax.sharding import Layout, make_layout
from tools import chips, hlo, programs, report
from train.command_line import parse
from train.settings import Optimization, Settings

LARGEST = 5  # arrays that are listed if compilation fails


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is planned, and for which devices."""

    topology: str = "local"
    """Devices: `v5e:16x16`, or v4, v5p, v6e with their shapes; `cpu:8` (emulated); `local` (this
    machine's)."""
    unet_number: str = "1"
    """Which U-Net: 1, 2, 3 or base, sr256, sr1024."""
    sample: bool = False
    """A denoising step of the sampler, instead of a training step."""
    text: bool = False
    """The encoding of --batch-size captions by T5-XXL, instead."""
    out: Path | None = None
    """Write the numbers as JSON, too."""
    hlo: Path | None = None
    """Also write the text of the compiled program to this file."""


def main() -> None:
    plan, settings = parse(__doc__, Plan)
    if plan.sample and plan.text:
        raise UserError("--sample and --text: give only one of them.")
    devices = chips.devices(plan.topology)
    chip = chips.chip(devices[0])
    if settings.dtype == "auto":
        on_cpu = devices[0].platform == "cpu"
        dtype = "float32" if on_cpu else "bfloat16"
        settings = dataclasses.replace(settings, dtype=dtype)
    layout = make_layout(settings.mesh, rows=settings.rows, devices=devices)
    planned = trace(plan, settings, layout)
    print(f"{planned.title}, {settings.dtype}\n{layout.describe()}", flush=True)
    trains = not (plan.sample or plan.text)
    if trains and settings.cascade().condition_on_text and settings.embeddings is None:
        print(
            "not counted: the text encoder, which is in memory too unless --embeddings is given "
            "(--text plans T5-XXL)"
        )
    numbers = compiled(planned, layout, chip, flags(plan, settings, layout), plan.hlo)
    numbers = {"title": planned.title, "devices": layout.describe()} | numbers
    if plan.out is not None:
        plan.out.parent.mkdir(parents=True, exist_ok=True)
        plan.out.write_text(json.dumps(numbers, indent=1) + "\n")
    if numbers["fits"] is False:
        raise UserError("it does not fit.")


def trace(plan: Plan, settings: Settings, layout: Layout) -> programs.Planned:
    """The requested program, traced with shapes."""
    dtype = settings.compute_dtype
    config, number = settings.cascade(), commands.stage_number(plan.unet_number)
    if plan.text:
        return programs.text_encoding(settings.batch_size, 256, dtype, layout)
    if number > len(config.unets) or isinstance(config.unets[number - 1], NullUnetConfig):
        raise UserError(f"--unet-number {plan.unet_number}: the cascade has no such U-Net.")
    if plan.sample:
        return programs.sampling_step(config.stage(number), settings.batch_size, dtype, layout)
    optimization = settings.section(Optimization)
    return programs.train_step(config.stage(number), optimization, layout)


def compiled(
    planned: programs.Planned,
    layout: Layout,
    chip: chips.Chip | None,
    given: dict[str, Any],
    keep: Path | None = None,
) -> dict[str, Any]:
    """Compiles, prints the report, and returns its numbers as JSON-ready values."""
    began = time.perf_counter()
    try:
        executable = planned.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        show(refused(error, planned, layout, chip, given))
        return numbers_of(planned) | {"fits": False, "error": first_line(error)}
    seconds = time.perf_counter() - began
    print(f"compiled in {seconds:.0f} s\n")
    text = executable.as_text()
    if keep is not None:
        keep.write_text(text)
    moved = report.moved(hlo.collectives(text, layout.mesh.size))
    memory = report.Memory.of(executable)
    bound = None if chip is None else bound_of(planned, layout, chip, memory, moved)
    show(findings(planned, moved, memory, bound, chip, given))
    numbers = numbers_of(planned) | {
        "fits": None if chip is None else memory.total <= chip.hbm,
        "compile_seconds": round(seconds, 1),
        "memory": dataclasses.asdict(memory) | {"total": memory.total},
        "collectives": moved,
    }
    if bound is None:
        return numbers
    in_turn, overlapped = bound.utilisation
    return numbers | {
        "chip": dataclasses.asdict(chip) | {"peak": chip.peak},
        "seconds": dataclasses.asdict(bound),
        "utilisation": {"overlapped": overlapped, "in_turn": in_turn},
        "network_share": bound.network_share,
    }


def numbers_of(planned: programs.Planned) -> dict[str, Any]:
    """What is known before compilation."""
    return {
        "model_flops": planned.model_flops,
        "program_flops": planned.program_flops,
        "argument_parts": planned.argument_bytes(),
    }


def bound_of(
    planned: programs.Planned,
    layout: Layout,
    chip: chips.Chip,
    memory: report.Memory,
    moved: report.Moved,
) -> report.Bound:
    peak = chip.peak * layout.mesh.size
    return report.Bound(
        compute=planned.program_flops / peak,
        memory=(memory.arguments + memory.outputs) / chip.hbm_bandwidth,
        network=sum(one["sent"] for one in moved.values()) / chip.link_bandwidth,
        model=planned.model_flops / peak,
    )


def findings(
    planned: programs.Planned,
    moved: report.Moved,
    memory: report.Memory,
    bound: report.Bound | None,
    chip: chips.Chip | None,
    given: dict[str, Any],
) -> Iterator[str]:
    """The report on a program that compiled."""
    parts = planned.argument_bytes()
    yield from report.describe_memory(memory, parts, chip)
    if chip is not None and memory.total > chip.hbm:
        yield from report.advice(memory, parts, chip, given)
    yield ""
    yield from report.describe_moved(moved, planned.per)
    yield ""
    yield (
        f"arithmetic per {planned.per}: {report.operations(planned.model_flops)} for the model, "
        f"{report.operations(planned.program_flops)} with recomputation"
    )
    if bound is None:
        yield "no time: the published numbers of these devices are not in tools/chips.py"
    else:
        yield from report.describe_bound(bound, chip)


def refused(
    error: Exception,
    planned: programs.Planned,
    layout: Layout,
    chip: chips.Chip | None,
    given: dict[str, Any],
) -> Iterator[str]:
    """The compiler's error, what is known without compiling, and what would help."""
    parts = planned.argument_bytes()
    yield f"\nthe compiler: {first_line(error)}"
    yield "arguments per device: " + ", ".join(
        f"{name} {report.size(size)}" for name, size in parts.items()
    )
    yield "results of products and convolutions, per device if all were kept:"
    for size, what in programs.activations(planned, layout)[:LARGEST]:
        yield f"  {report.size(size):>12}   {what}"
    if chip is not None:
        yield from report.advice(None, parts, chip, given)


def flags(plan: Plan, settings: Settings, layout: Layout) -> dict[str, Any]:
    """The flags that determine memory use."""
    given = {"mesh": layout.mesh.devices.shape, "rows": settings.rows, "dtype": settings.dtype}
    if not (plan.sample or plan.text):
        for name in ("remat", "accumulate", "optimizer", "moments"):
            given[name] = getattr(settings, name)
    return given


def show(lines: Iterator[str]) -> None:
    for line in lines:
        print(line)


if __name__ == "__main__":
    commands.run(main)
