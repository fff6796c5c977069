"""What a compiled program moves between devices and keeps in memory, read from its text.

A program of XLA is a list of computations that call each other: loops call a body, fusions an
inside. An instruction counts as often as its computation is run: once for ENTRY, and in a loop as
often as the loop goes around, where the text tells (scans do; a bound that is data does not).

libtpu writes a collective several times, to overlap it: its start, what runs meanwhile, its end.
These have the numbers of one chain and one channel, and count once.
"""

import dataclasses
import functools
import math
import re

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<kind>all-gather|reduce-scatter|all-reduce|ragged-all-to-all|all-to-all"
    r"|collective-permute)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    """One of KINDS."""
    payload: int
    """Bytes of what is gathered, summed or exchanged, as one device of the group sees it whole."""
    group: int
    """Devices that take part together."""
    times: int
    """How often it runs in one call of the program; a loop of unknown length counts once."""
    name: str
    """The operation of the source that it serves."""

    @property
    def sent(self) -> int | float:
        """Bytes that each device must send, by the algorithm that sends least."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)
        return self.times * self.payload * factor


@dataclasses.dataclass(frozen=True)
class Program:
    """The text of a compiled program for so many devices."""

    text: str
    devices: int

    @functools.cached_property
    def computations(self) -> dict[str, list[str]]:
        """Name -> instructions. The one that runs first is called ENTRY."""
        found, lines = {}, []
        for line in self.text.splitlines():
            header = _HEADER.match(line)
            if header:
                lines = found.setdefault("ENTRY" if header[1] else header[2], [])
            elif line.startswith("  "):
                lines.append(line)
        return found

    @functools.cached_property
    def _calls(self) -> dict[str, list[tuple[str, int, bool]]]:
        """Computation -> those that call it, how often at each run, and whether by a fusion."""
        calls = {}
        for caller, lines in self.computations.items():
            for line in lines:
                inner = " fusion(" in line or "to_apply=" in line
                for role, names in _CALLED.findall(line):
                    for name in re.findall(r"[\w.\-]+", names):
                        loop = role in ("body", "condition")
                        times = (self._length(line) or 1) if loop else 1
                        calls.setdefault(name, []).append((caller, times, inner))
        return calls

    def _length(self, loop: str) -> int | None:
        """How often a loop goes around, None if the text does not tell."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop)
        if known:
            return int(known[1])
        # libtpu leaves it to the condition: counter < constant, the counter from 0 up.
        condition, body = (
            "\n".join(self.computations[re.search(rf"\b{role}=%?([\w.\-]+)", loop)[1]])
            for role in ("condition", "body")
        )
        compared = re.search(
            r"ROOT.* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", condition
        )
        bound = compared and _constant(compared[2], condition)
        place = compared and re.search(rf"{re.escape(compared[1])} = .*index=(\d+)", condition)
        if bound is None or place is None:
            return None
        return -(-bound // _increment(int(place[1]), body))

    @functools.cache  # noqa: B019  (a program lives as long as its report)
    def runs(self, computation: str) -> int:
        """How often a computation runs in one call of the program."""
        if computation == "ENTRY":
            return 1
        callers = self._calls.get(computation, ())
        return sum(times * self.runs(caller) for caller, times, _ in callers)

    @functools.cached_property
    def open_loops(self) -> int:
        """Loops of unknown length with a collective in them."""
        busy = {name for name, lines in self.computations.items() if any(map(_is_one, lines))}
        while True:  # and all that call one
            more = {caller for name in busy for caller, _, _ in self._calls.get(name, ())}
            if more <= busy:
                break
            busy |= more
        loops = [
            (line, re.search(r"body=%?([\w.\-]+)", line)[1])
            for lines in self.computations.values()
            for line in lines
            if " while(" in line
        ]
        return sum(self._length(line) is None and body in busy for line, body in loops)

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        found: dict[str, Collective] = {}
        for computation, lines in self.computations.items():
            for number, line in enumerate(filter(_is_one, lines)):
                one = self._read(computation, line)
                # Channels alone do not tell: all that shard_map makes have number 1.
                chain = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', line)
                key = f"{one.kind}/{chain[1]}/{chain[2]}" if chain else f"{computation}/{number}"
                if one.times and (key not in found or one.times > found[key].times):
                    found[key] = one
        return list(found.values())

    def largest(self, count: int) -> list[tuple[int, str, str]]:
        """(bytes of one, number and shape, an operation of the source that makes one) of the
        largest arrays that are written to memory on one device; not those inside a fusion."""
        sizes: dict[str, int] = {}
        sources: dict[str, list[str]] = {}
        for computation, lines in self.computations.items():
            if any(inner for _, _, inner in self._calls.get(computation, ())):
                continue
            for line in lines:
                made = re.search(r"= (?P<type>[a-z]\S*\[[\d,]*\])\S* (?P<op>[\w\-]+)\(", line)
                if made is None or made["op"] in ("parameter", "bitcast", "get-tuple-element"):
                    continue
                sizes[made["type"]] = sum(_sizes(made["type"]))
                sources.setdefault(made["type"], []).append(_source(line))
        ordered = sorted(sizes, key=sizes.get, reverse=True)[:count]
        return [(sizes[t], f"{len(sources[t])} x {t}", max(sources[t], key=len)) for t in ordered]

    def _read(self, computation: str, line: str) -> Collective:
        made = _COLLECTIVE.search(line)
        kind, sizes = made["kind"].removeprefix("ragged-"), _sizes(made["type"])
        if made["start"] and kind == "all-gather":
            sizes = sizes[len(sizes) // 2 :]  # the operands, then the results
        elif made["start"] and kind == "collective-permute":
            sizes = sizes[1:2]
        payload, group = sum(sizes), _group(line, self.devices)
        if kind == "reduce-scatter":
            payload *= group
        if computation.startswith("all-reduce-scatter"):  # libtpu's name for one of these
            kind = "reduce-scatter"
        return Collective(kind, payload, group, self.runs(computation), _source(line))


def _constant(name: str, lines: str) -> int | None:
    found = re.search(rf"%?{re.escape(name)} = [su]\d+\[\]\S* constant\((\d+)\)", lines)
    return int(found[1]) if found else None


def _increment(place: int, body: str) -> int:
    """What a loop adds to the counter that has this place among its variables; 1 if it is not
    plainly an addition there."""
    root = re.search(r"ROOT .* tuple\((.*?)\)", body)
    if root is None:
        return 1
    name = re.sub(r"/\*.*?\*/", "", root[1]).split(", ")[place].strip().lstrip("%")
    added = re.search(rf"%?{re.escape(name)} = .* add\(%?[\w.\-]+, %?([\w.\-]+)\)", body)
    return (added and _constant(added[1], body)) or 1


def _is_one(line: str) -> bool:
    return _COLLECTIVE.search(line) is not None


def _source(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1].replace("\\'", "'").partition(";")[0] if found else ""


def _sizes(shapes: str) -> list[int]:
    """Bytes of the arrays of a type, which may be a tuple."""
    found = []
    for dtype, dims in _ARRAY.findall(shapes):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        found.append(bits * math.prod(int(n) for n in dims.split(",") if n) // 8)
    return found


def _group(line: str, devices: int) -> int:
    """Devices of one group, in the three ways that XLA writes groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        size = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", axes[1])}
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", axes[2])  # 'x', or 'x':(before)part
        return math.prod(int(part) if part else size[name] for name, part in parts)
    return devices
