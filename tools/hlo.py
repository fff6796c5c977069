"""The collectives of a compiled program, read from its text.

XLA's text is a list of computations that call each other. A collective runs as often as its
computation: once in ENTRY, and in a loop as often as the loop iterates, if the text says so (it
does for scans; a loop whose length depends on data counts once).

libtpu overlaps a collective by writing it several times (start, middle, end), with the same chain
and channel number. These count once.
"""

import collections
import dataclasses
import functools
import math
import re

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_NAME = r"%?([\w.\-]+)"
_HEADER = re.compile(rf"(ENTRY )?{_NAME} \(.*\{{$")
_CALL = re.compile(r"\b(body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_COLLECTIVE = re.compile(rf"= (.*?) (?:ragged-)?({'|'.join(KINDS)})(-start)?\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    """One of KINDS."""
    payload: int
    """Bytes of the complete array that is gathered, summed or exchanged within a group."""
    group: int
    """Devices that take part together."""
    times: int
    """How often it runs in one call of the program."""

    @property
    def sent(self) -> int | float:
        """Bytes that each device must send, with the algorithm that sends least."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)
        return self.times * self.payload * factor


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives in the text of a program compiled for this number of devices."""
    program = _computations(text)
    callers = collections.defaultdict(list)
    for caller, lines in program.items():
        for line in lines:
            for role, names in _CALL.findall(line):
                times = _length(line, program) if role in ("body", "condition") else 1
                for name in re.findall(r"[\w.\-]+", names):
                    callers[name].append((caller, times))

    @functools.cache
    def runs(name: str) -> int:
        return 1 if name == "ENTRY" else sum(n * runs(caller) for caller, n in callers[name])

    found: dict[str, Collective] = {}
    for name, lines in program.items():
        for number, line in enumerate(lines):
            if runs(name) and _COLLECTIVE.search(line):
                one = _collective(line, name, runs(name), devices)
                # Channels are not enough: all those from shard_map have number 1.
                chain = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', line)
                key = f"{one.kind}/{chain[1]}/{chain[2]}" if chain else f"{name}/{number}"
                if key not in found or one.times > found[key].times:
                    found[key] = one
    return list(found.values())


def _computations(text: str) -> dict[str, list[str]]:
    """Name -> instructions; the one that runs first is called ENTRY."""
    found, lines = {}, []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = found.setdefault("ENTRY" if header[1] else header[2], [])
        elif line.startswith("  "):
            lines.append(line)
    return found


def _collective(line: str, computation: str, times: int, devices: int) -> Collective:
    types, kind, start = _COLLECTIVE.search(line).groups()
    sizes = _sizes(types)
    if start and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]  # the operands, then the results
    elif start and kind == "collective-permute":
        sizes = sizes[1:2]
    payload, group = sum(sizes), _group(line, devices)
    if kind == "reduce-scatter":
        payload *= group
    if computation.startswith("all-reduce-scatter"):  # libtpu's name for one of these
        kind = "reduce-scatter"
    return Collective(kind, payload, group, times)


def _length(loop: str, program: dict[str, list[str]]) -> int:
    """How often a loop iterates; 1 if the text does not say."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop):
        return int(known[1])
    # libtpu gives only the condition: counter < constant, with the counter starting at 0.
    condition, body = (
        "\n".join(program[re.search(rf"\b{role}={_NAME}", loop)[1]])
        for role in ("condition", "body")
    )
    compared = re.search(rf"ROOT.* compare\({_NAME}, {_NAME}\), direction=LT", condition)
    bound = compared and _constant(compared[2], condition)
    place = compared and re.search(rf"{re.escape(compared[1])} = .*index=(\d+)", condition)
    if not bound or not place:
        return 1
    # The counter increases by a constant in the body, or by one.
    root = re.search(r"ROOT .* tuple\((.*?)\)", body)
    names = re.sub(r"/\*.*?\*/", "", root[1]).split(", ") if root else [""]
    counter = re.escape(names[int(place[1])].strip().lstrip("%")) if root else "none"
    added = re.search(rf"%?{counter} = .* add\({_NAME}, {_NAME}\)", body)
    return -(-bound // ((added and _constant(added[2], body)) or 1))


def _constant(name: str, lines: str) -> int | None:
    found = re.search(rf"%?{re.escape(name)} = [su]\d+\[\]\S* constant\((\d+)\)", lines)
    return int(found[1]) if found else None


def _sizes(types: str) -> list[int]:
    """Bytes of the arrays in a type, which may be a tuple."""
    found = []
    for dtype, dims in re.findall(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]", types):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        found.append(bits * math.prod(int(n) for n in dims.split(",") if n) // 8)
    return found


def _group(line: str, devices: int) -> int:
    """Number of devices in a group, which XLA writes in three ways."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        size = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", axes[1])}
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", axes[2])  # 'x', or 'x':(before)part
        return math.prod(int(part) if part else size[name] for name, part in parts)
    return devices
