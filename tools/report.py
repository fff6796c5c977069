"""What a plan found, as numbers and as text."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from tools.chips import Chip
from tools.hlo import KINDS, Collective

Moved = dict[str, dict[str, int | float]]
"""For each kind of collective: how many run, and the bytes that each device sends for them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device while the program runs."""

    arguments: int
    outputs: int
    aliased: int
    """Outputs that reuse the memory of arguments."""
    temporaries: int
    code: int

    @classmethod
    def of(cls, compiled: Any) -> "Memory":
        found = compiled.memory_analysis()
        return cls(
            arguments=found.argument_size_in_bytes,
            outputs=found.output_size_in_bytes,
            aliased=found.alias_size_in_bytes,
            temporaries=found.temp_size_in_bytes,
            code=found.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time that a call can take, in seconds of each resource, and what follows from it.

    Arithmetic at the chip's bfloat16 peak; memory reads each argument and writes each output once;
    the network sends what every device must send, over all of its links at once. None of these is
    ever reached: each is a lower bound.
    """

    compute: float
    memory: float
    network: float
    model: float
    """`compute` without recomputation."""

    @property
    def overlapped(self) -> float:
        """Seconds, if communication entirely overlaps with arithmetic."""
        return max(self.compute, self.memory, self.network)

    @property
    def in_turn(self) -> float:
        """Seconds, if it does not overlap at all."""
        return max(self.compute, self.memory) + self.network

    @property
    def utilisation(self) -> tuple[float, float]:
        """Maximum model FLOP utilisation: if nothing overlaps, and if everything does."""
        return self.model / self.in_turn, self.model / self.overlapped

    @property
    def network_share(self) -> float:
        """The network's share of `in_turn`."""
        return self.network / self.in_turn


_SECONDS = ("compute", "memory", "network", "overlapped", "in_turn")


def moved(collectives: list[Collective]) -> Moved:
    found = {}
    for kind in KINDS:
        of_kind = [one for one in collectives if one.kind == kind and one.group > 1]
        if of_kind:
            found[kind] = {
                "runs": sum(one.times for one in of_kind),
                "sent": sum(one.sent for one in of_kind),
            }
    return found


def size(count: int | float) -> str:
    """Bytes as readable text."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:,.2f} {unit}"
    return f"{count / 1024:,.2f} KiB"


def operations(count: int | float) -> str:
    """Floating-point operations as readable text."""
    power, unit = next(
        ((p, u) for p, u in ((1e15, "P"), (1e12, "T"), (1e9, "G")) if count >= p), (1e6, "M")
    )
    return f"{count / power:,.2f} {unit}FLOP"


def describe_memory(memory: Memory, parts: dict[str, int], chip: Chip | None) -> Iterator[str]:
    yield "memory per device" + (f", which has {size(chip.hbm)}" if chip else "")
    listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    yield f"  arguments    {size(memory.arguments):>12}   {listed}"
    yield f"  outputs      {size(memory.outputs):>12}   {size(memory.aliased)} reusing arguments"
    yield f"  temporaries  {size(memory.temporaries):>12}"
    yield f"  program      {size(memory.code):>12}"
    verdict = ""
    if chip:
        share = memory.total / chip.hbm
        verdict = f"{'fits' if share <= 1 else 'does not fit'}: {share:.1%}"
    yield f"  at once      {size(memory.total):>12}   {verdict}".rstrip()


def describe_moved(kinds: Moved, per: str) -> Iterator[str]:
    if not kinds:
        yield "between devices: nothing moves"
        return
    yield f"between devices, per {per}: collectives, and the least that each device sends for them"
    for kind, one in kinds.items():
        yield f"  {kind:<18} {one['runs']:>7,} {size(one['sent']):>14}"
    yield f"  {'in all':<18} {'':>7} {size(sum(one['sent'] for one in kinds.values())):>14}"
    yield "  (a loop whose length depends on data counts once)"


def describe_bound(bound: Bound, chip: Chip) -> Iterator[str]:
    least, most = bound.utilisation
    ms = {name: f"{getattr(bound, name) * 1e3:.3g} ms" for name in _SECONDS}
    yield f"at best, given the published numbers of a {chip.kind} ({chip.source}):"
    yield f"  arithmetic {ms['compute']}, memory {ms['memory']}, network {ms['network']}"
    yield f"  all overlapped {ms['overlapped']}: model FLOP utilisation at most {most:.0%}"
    yield (
        f"  network not overlapped {ms['in_turn']}, its share {bound.network_share:.0%}: "
        f"at most {least:.0%}"
    )


def advice(
    memory: Memory | None, parts: dict[str, int], chip: Chip, flags: dict[str, Any]
) -> Iterator[str]:
    """What dominates memory, and the flags that would help, the least harmful first."""
    kept = sum(parts.values())
    temporaries = memory.temporaries if memory else max(chip.hbm - kept, 0)
    state_first = kept > temporaries
    what = max(parts, key=parts.get) if state_first else "temporaries of the call"
    yield f"most of it is {what}:"
    data, model = flags["mesh"]
    if not state_first:
        if flags.get("remat") is None and "remat" in flags:
            yield "  --remat nothing_saveable keeps only the inputs of blocks"
        rows = flags["rows"] // data
        if rows > 1:
            if "accumulate" in flags:
                yield f"  --accumulate {2 * flags['accumulate']} halves the images taken at once"
            else:
                yield f"  --batch-size {flags['rows'] // 2} halves the batch"
        if flags.get("dtype") == "float32":
            yield "  --dtype bfloat16 halves the bytes per number"
        yield f"  --mesh {data}x{2 * model} on twice the devices splits channels too"
        return
    if flags.get("optimizer") == "adam" and flags.get("moments") == "float32":
        yield "  --moments bfloat16 halves the optimiser's part"
        yield "  --optimizer adafactor needs almost none"
    yield f"  --mesh {2 * data}x{model}, on twice the devices, halves parameters, average, moments"
