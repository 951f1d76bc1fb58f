"""Instructions a logit and widths of accesses in the machine code for sm_90: the figures of kernels/README.md.

Counted on the shortest way through the loop over whole tiles, of which a thread has some logits each. A bound has room
for another version of Triton, less than what was won.
"""

import importlib.util
import itertools
import os
import re
from typing import NamedTuple

import pytest
from compiled_kernels import OFF, Variant, launch_of, machine_code
from machine_code import Loop, loops

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted"),
]


class Reading(NamedTuple):
    """Counts a logit of one reading of a row, the widths of its accesses in bits, and its loop over whole tiles."""

    instructions: float
    special: float
    shuffles: float
    widths: set[str]
    loop: Loop


def readings(variant: Variant) -> list[Reading]:
    """The first reading of a row and the second, which writes the gradient."""
    launch = launch_of(variant)
    logits_a_thread = launch.chunks * launch.chunk / (32 * launch.num_warps)
    found = []
    for kinds in ({"LDG"}, {"LDG", "STG"}):
        fitting = [loop for loop in loops(machine_code(90, variant).code) if kinds == {"LDG", "STG"} & set(loop.counts)]
        # The other loop is of the rest: it has fewer logits, or as many and more instructions, for masks.
        loop = min(fitting, key=lambda loop: (-loop.counts["MUFU"], len(loop.way)))
        counts = (len(loop.way), loop.counts["MUFU"], loop.counts["SHFL"])
        widths = set().union(*(loop.widths(kind) for kind in kinds))
        found.append(Reading(*(count / logits_a_thread for count in counts), widths, loop))
    return found


SOFTCAP = (False, True, False)
WIDE = Variant("loss_rows", "bf16", OFF, False, True)


# Before: with triton 3.7.1, from the code of 29 November 2026.
@pytest.mark.parametrize(
    ("variant", "before", "most", "special"),
    [
        # 16 bits, 6 shuffles and 2 special functions a logit in the first reading.
        pytest.param(WIDE._replace(width=50257, edges=1), (27.0, 13.6), (8.7, 8.4), 1.2, id="rows-begin-anywhere"),
        # 3.1 special functions a logit in both.
        pytest.param(WIDE._replace(width=50304, flags=SOFTCAP), (26.4, 34.0), (22.5, 24.5), 2.2, id="softcap"),
        # Loaded ahead, the second reading pays with most of what it has won.
        pytest.param(WIDE, (7.9, 9.2), (9.6, 9.0), 1.2, id="widest"),
    ],
)
def test_instructions_a_logit(variant, before, most, special):
    found = readings(variant)
    assert len(found) == 2
    for reading, bound in zip(found, most, strict=True):
        assert 4 < reading.instructions < bound
        assert 1 <= reading.special < special
        assert reading.shuffles == 0
        assert reading.widths == {"128"}
    assert sum(most) < sum(before) or variant == WIDE
    assert machine_code(90, variant).spilled == 0


def test_a_row_with_a_multiprocessor_to_itself_has_its_tiles_loaded_ahead():
    """A load is issued before the work on the tile before; the first reading ends with the tile that the second begins
    with, so that no thread waits for memory behind the barriers of the reduction."""
    other = WIDE._replace(width=50257, edges=1)
    assert [launch_of(variant).ahead for variant in (WIDE, other)] == [True, False]
    ahead, at_once = ([reading.loop.behind_loads for reading in readings(variant)] for variant in (WIDE, other))
    assert min(ahead) > 48 > max(at_once)
    # What is loaded between the last barrier and the first store is the tile after.
    behind = machine_code(90, WIDE).code.rpartition("BAR.SYNC")[2]
    before_store = behind[: re.search(r"STG\.E\.128", behind).start()]
    assert len(re.findall(r"LDG\.E\.128", before_store)) == 2


def test_the_last_tile_is_no_wider_than_what_is_left():
    from megamix_kernels.triton_loss import launch_for, rest_of

    for width, wanted in {50304: 2, 50257: 2, 151936: 4, 128256: 8, 32000: 8, 131072: 1, 65537: 8}.items():
        assert rest_of(launch_for(width, 2), width, width, int(width % 8 > 0)) == wanted
    # One tile is enough wherever a row begins.
    for width in (1, 7, 8, 9, 4100, 8191, 8192, 8193, 8199, 8200, 50264):
        launch = launch_for(width, 2)
        for valid, head in itertools.product({1, width // 2 + 1, width}, range(8)):
            body = max(width - head, 0) // 8 * 8
            left = max(min(valid - head, body), 0) % (launch.chunks * launch.chunk)
            assert left <= launch.chunks * rest_of(launch, width, valid, 1) <= launch.chunks * launch.chunk
