"""What a compiled program sends over the wire, read from its text (HLO after all passes)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{\s*$")
_END = re.compile(r"^\}(, execution_thread=\S+)?\s*$")  # instructions go on over lines, of which some begin with "}}"
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*)$")
_SHAPE = re.compile(r"\b(pred|token|[suf]\d+|bf16|c64|c128|f8\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    kind: str
    count: int  # how often it runs in a step: trip counts of the loops around it are multiplied
    payload_bytes: float  # once: what is gathered, reduced, scattered or sent, whole, on one device
    group: int  # devices that take part together
    crosses: bool  # whether a group spans several slices, or hosts of GPUs

    @property
    def wire_bytes(self) -> float:
        """Once: what leaves each device at least."""
        share = (self.group - 1) / self.group
        return self.payload_bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


@dataclasses.dataclass
class _Computation:
    instructions: list[str]
    entry: bool


def read_collectives(text: str, devices: int, per_group: int | None = None) -> list[Collective]:
    """The collectives of a program that run, those in loops with their trip counts.

    Args:
      text: of the compiled program.
      devices: that it runs on.
      per_group: devices with fast links among each other, in order of their numbers; None for all.
    """
    computations = _computations(text)
    entry = next((name for name, one in computations.items() if one.entry), None)
    if entry is None:
        raise ValueError("the program's text has no ENTRY computation")
    found, seen = [], set()
    for step in _walk(computations, entry, 1, entry):
        one = _collective(step, devices, per_group or devices)
        if one is None:
            continue
        # Where a collective runs beside other work, its beginning, middle and end each name it, by the same chain.
        chain = re.search(r'chain_id="(\d+)"', step.line)
        name = (step.scope, one.kind, chain[1] if chain else step.line)
        if name not in seen:
            seen.add(name)
            found.append(one)
    return found


def collectives_by_kind(collectives: list[Collective]) -> dict[str, dict[str, float]]:
    """Sums by kind over a step: instructions, how often they run, bytes of payload and over the wire per device."""
    sums: dict[str, dict[str, float]] = {}
    for one in collectives:
        of_kind = sums.setdefault(one.kind, {"instructions": 0, "count": 0, "payload_bytes": 0.0, "wire_bytes": 0.0})
        of_kind["instructions"] += 1
        of_kind["count"] += one.count
        of_kind["payload_bytes"] += one.count * one.payload_bytes
        of_kind["wire_bytes"] += one.count * one.wire_bytes
    return {kind: sums[kind] for kind in sorted(sums)}


def count_calls(text: str, target: str) -> int:
    """Instructions of a program that call code of the given name, such as "tpu_custom_call"."""
    return len(re.findall(rf'custom_call_target="{re.escape(target)}"', text))


def _computations(text: str) -> dict[str, _Computation]:
    found: dict[str, _Computation] = {}
    current: _Computation | None = None
    for line in text.splitlines():
        if current is None:
            if match := _COMPUTATION.match(line):
                current = found[match[2]] = _Computation([], bool(match[1]))
        elif _END.match(line):
            current = None
        else:
            current.instructions.append(line)
    return found


class _Step(NamedTuple):
    """An instruction that runs."""

    line: str
    times: int
    scope: str  # the computations that run it, from the entry on, fusions left out
    inside: str  # the computation that holds it


def _walk(computations: dict[str, _Computation], name: str, times: int, scope: str) -> Iterator[_Step]:
    for line in computations[name].instructions:
        yield _Step(line, times, scope, name)
        inside = times * _trips(computations, line) if re.search(r"\bwhile\(", line) else times
        called = _CALLED.findall(line)
        for group in _BRANCHES.findall(line):
            called += [("branch", branch.strip().lstrip("%")) for branch in group.split(",")]
        for how, other in called:
            if other in computations:
                yield from _walk(computations, other, inside, scope if how == "calls" else f"{scope}/{other}")


def _trips(computations: dict[str, _Computation], line: str) -> int:
    """How often a loop runs: as the compiler notes it, else the constant that its condition compares with."""
    if match := _TRIPS.search(line):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    if condition and condition[1] in computations:
        text = "\n".join(step.line for step in _walk(computations, condition[1], 1, ""))
        if constants := re.findall(r"s(?:32|64)\[\][^ ]* constant\((\d+)\)", text):
            return max(map(int, constants))
    return 1


def _collective(step: _Step, devices: int, per_group: int) -> Collective | None:
    match = _INSTRUCTION.match(step.line)
    if match is None:
        return None
    text = " " + match[1]
    found = re.search(rf" ({'|'.join(KINDS)})(-start)?\(", text)
    if found is None:
        return None
    kind, started = found[1], bool(found[2])
    size = sum(map(_size, _SHAPE.finditer(text[: found.start()])))
    groups = _groups(step.line, devices)
    group = max(map(len, groups))
    # The result of one that is started names what goes in beside what comes out, but for all-reduce.
    if kind in ("all-gather", "reduce-scatter") and started:
        size *= group / (group + 1)
    elif kind != "all-reduce" and started:
        size /= 2
    elif kind == "reduce-scatter":
        size *= group
    elif kind == "all-reduce" and step.inside.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # which TPU compilers write as a fusion of the whole sum and a slice of it
    crosses = any(len({device // per_group for device in members}) > 1 for members in groups)
    return Collective(kind, step.times, size, group, crosses)


def _size(shape: re.Match[str]) -> float:
    dims = [int(side) for side in shape[2].split(",") if side]
    return math.prod(dims) * _BYTES.get(shape[1], 1)


def _groups(line: str, devices: int) -> list[list[int]]:
    """Device numbers that take part together."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape = [int(side) for side in match[3].split(",")]
        order = [int(axis) for axis in match[4].split(",")] if match[4] else list(range(len(shape)))
        numbers = _transposed(shape, order)
        size = int(match[2])
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sides = {axis: int(side) for axis, side in re.findall(r"'([^']+)'=(\d+)", match[1])}
        across = [axis.strip(" '") for axis in match[2].split(",")]
        order = [axis for axis in sides if axis not in across] + across
        numbers = _transposed([*sides.values()], [[*sides].index(axis) for axis in order])
        size = math.prod(sides[axis] for axis in across)
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line):
        return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d, ]*)\}", match[1])]
    return [list(range(devices))]


def _transposed(shape: list[int], order: list[int]) -> list[int]:
    """Numbers 0, 1, .. laid out in `shape`, its axes reordered, read out in order."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    numbers = [0]
    for axis in order:
        numbers = [number + index * strides[axis] for number in numbers for index in range(shape[axis])]
    return numbers
