"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|condition|to_apply|calls|\w+_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Return for each of KINDS that occurs how often a device takes part in one (count), and bytes.

    text: optimised HLO, as of `jax.stages.Compiled.as_text`. What stands in a loop counts as often as the loop is known to
    run, once where that is not known. Of an asynchronous pair the start counts. bytes are of the array that is whole in the
    end, or was at the start: what an all-gather returns, what a reduce-scatter is given.
    """
    own, calls, entry = _computations(text)
    times: Counter = Counter({entry: 1})
    for name in _callers_first(entry, calls):
        for called, trips in calls[name]:
            times[called] += times[name] * trips
    found: dict[str, dict[str, int]] = {}
    for name, ops in own.items():
        for kind, size in ops:
            if times[name]:
                total = found.setdefault(kind, {"count": 0, "bytes": 0})
                total["count"] += times[name]
                total["bytes"] += times[name] * size
    return found


def _computations(text: str) -> tuple[dict, dict, str]:
    """Return by computation its collectives (kind, bytes) and what it calls (name, how often), and the entry's name."""
    own: dict[str, list] = defaultdict(list)
    calls: dict[str, list] = defaultdict(list)
    entry = current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            entry = current if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            kind = found["op"].removesuffix("-start")
            if kind in KINDS and not _alone(found["rest"]):
                own[current].append((kind, _bytes(kind, found["op"].endswith("-start"), found["type"], found["rest"])))
            elif not found["op"].startswith(KINDS):  # what reduces in a collective is no call
                trips = _TRIPS.search(line)
                for several, one in _CALLED.findall(found["rest"]):
                    names = (several or one).split(",")
                    calls[current] += [(name.strip(" %"), int(trips[1]) if trips else 1) for name in names]
    return own, calls, entry


def _callers_first(entry: str, calls: dict) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for called, _ in calls[name]:
                visit(called)
            order.append(name)

    visit(entry)
    return order[::-1]


def _bytes(kind: str, starts: bool, type: str, rest: str) -> int:
    """Return the bytes of a collective. The start of some returns its operands too, before its results."""
    arrays = [_array_bytes(*array) for array in _ARRAY.findall(type)]
    if starts and kind in ("all-gather", "reduce-scatter", "all-to-all"):
        arrays = arrays[len(arrays) // 2 :]
    if starts and kind == "collective-permute":
        arrays = arrays[1:2]
    return sum(arrays) * (_group_size(rest) if kind == "reduce-scatter" else 1)


def _array_bytes(dtype: str, dimensions: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype)[:2] or 8)
    return -(-math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8)


def _alone(rest: str) -> bool:
    """Return whether the groups are of one device each, which send nothing."""
    return bool(re.search(r"replica_groups=(?:\[\d+,1\]|\{\{\d+\}[,}])", rest))


def _group_size(rest: str) -> int:
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(explicit[1].split(",")) if explicit else 1
