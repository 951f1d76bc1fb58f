"""Loops of a kernel's machine code, as cuobjdump prints it."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple


class Loop(NamedTuple):
    """Instructions of the shortest way through an innermost loop, from its first to its branch back."""

    way: list[str]

    @property
    def counts(self) -> Counter[str]:
        """Instructions by name, without modifiers."""
        return Counter(_name(instruction).split(".")[0] for instruction in self.way)

    def widths(self, kind: str) -> set[str]:
        """Bits of the accesses of a kind, LDG or STG."""
        names = [_name(instruction) for instruction in self.way]
        accesses = [name for name in names if name.split(".")[0] == kind]
        return {found[0] if (found := re.findall(r"\.U?(8|16|64|128)\b", name)) else "32" for name in accesses}

    @property
    def behind_loads(self) -> int:
        """Instructions between the last load of the way and the first that reads what it has loaded."""
        last = max(index for index, instruction in enumerate(self.way) if _name(instruction).startswith("LDG"))
        (first,) = re.findall(r"LDG\S*\s+R(\d+)", self.way[last])
        loaded = {f"R{int(first) + offset}" for offset in range(4)}
        for index, instruction in enumerate(self.way[last + 1 :]):
            if loaded & set(re.findall(r"\bR\d+\b", instruction.partition(",")[2])):
                return index
        return len(self.way) - last


def loops(code: str) -> list[Loop]:
    """Innermost loops of NVIDIA machine code, in their order.

    Where a loop branches, a rare case is longer than the usual one.
    """
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", code, re.MULTILINE)
    places = {int(address, 16): index for index, (address, _) in enumerate(found)}
    instructions = [instruction for _, instruction in found]
    targets = [_target(instruction, places) for instruction in instructions]
    spans = [(target, index) for index, target in enumerate(targets) if target is not None and target < index]
    inner = [span for span in spans if not any(span[0] <= a and b <= span[1] for a, b in spans if (a, b) != span)]
    return [Loop([instructions[index] for index in _shortest_way(instructions, targets, *span)]) for span in inner]


def _name(instruction: str) -> str:
    """The name of an instruction, with modifiers and without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _target(instruction: str, places: dict[int, int]) -> int | None:
    branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
    return places.get(int(branch[1], 16)) if branch else None


def _shortest_way(instructions: list[str], targets: list[int | None], first: int, last: int) -> list[int]:
    """Indices of the fewest instructions from the first to the last, which all lie between."""
    previous: dict[int, int] = {first: first}
    edge = [first]
    while edge and last not in previous:
        reached = []
        for index in edge:
            steps = [targets[index]]
            if instructions[index].startswith("@") or _name(instructions[index]).split(".")[0] not in ("BRA", "EXIT"):
                steps.append(index + 1)
            for step in steps:
                if step is not None and first <= step <= last and step not in previous:
                    previous[step] = index
                    reached.append(step)
        edge = reached
    way = [last]
    while way[-1] != first:
        way.append(previous[way[-1]])
    return way[::-1]
