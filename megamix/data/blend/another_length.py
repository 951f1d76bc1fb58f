"""Another length of samples: the blend that goes on at the same position, each domain where it stands in tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.data.blend.blend import Blend
from megamix.data.blend.rest import Rest, stand_of
from megamix.data.blend.segment import Segment


def with_length(blend: Blend, tokens: Sequence[int] | NDArray[np.int64], before: int, after: int) -> Blend:
    """``blend`` from its position on, with samples of another length.

    Positions go on counting samples. The epoch that a domain is in ends with its `Rest`; a domain that stands at the
    beginning of one begins it with the new length. Counts are restated in samples of the new length, so that a whole
    epoch is ``num_samples`` of them as ever, and so are deficits, which keep their tokens.

    Args:
        tokens: [K], tokens of each domain that are a label: all but the first.
        before, after: tokens of a sample.

    Raises:
        InputError: a domain has fewer tokens than a sample of the new length.
    """
    label_k = np.asarray(tokens, np.int64)
    if (label_k // before != blend.num_samples).any():
        raise InputError(
            f"the samples of the domains are {blend.num_samples.tolist()}, and their tokens make {(label_k // before).tolist()} "
            f"of {before}. Give the data that the run was made with."
        )
    num_samples, counts = label_k // after, np.zeros(blend.num_domains, np.int64)
    hashes, rests = blend.domain_hashes.tolist(), dict[int, Rest]()
    for domain, (count, size) in enumerate(zip(blend.counts.tolist(), num_samples.tolist(), strict=True)):
        number = int(label_k[domain])
        epoch, window, place = stand_of(count, number, before, blend.rests.get(domain))
        counts[domain] = epoch * size
        if place:
            left = -(-(number - place) // after)
            # A rest may have one sample more than a whole epoch of the new length; counts are not negative.
            start = max((epoch + 1) * size - left, 0)
            counts[domain] = start
            extra = start + left - (epoch + 1) * size
            rests[domain] = Rest(number, window, epoch, hashes[domain], place, after, start, extra)
    position = blend.position
    segment = Segment(position, blend.weights, blend.deficits * (before / after), counts)
    found = Blend.from_segment(
        num_samples, segment, blend.seed, domain_keys=blend.domain_keys, sampling=blend.sampling, rests=rests
    )
    for at, weights in blend.ledger:
        if at > position:
            found.set_weights(weights, at=at)
    return found
