"""Loops of a kernel's machine code, as cuobjdump prints it."""

import re


def loops(code: str) -> list[list[str]]:
    """Instructions of each innermost loop of NVIDIA machine code, in their order: from the target of a backward branch
    to the branch."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    places = {int(address, 16): index for index, (address, _) in enumerate(found)}
    spans = []
    for index, (_, instruction) in enumerate(found):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        # A kernel ends in a branch to itself.
        if branch and places.get(int(branch[1], 16), index) < index:
            spans.append((places[int(branch[1], 16)], index))
    inner = [span for span in spans if not any(span[0] <= a and b <= span[1] for a, b in spans if (a, b) != span)]
    return [[instruction for _, instruction in found[first : last + 1]] for first, last in inner]
