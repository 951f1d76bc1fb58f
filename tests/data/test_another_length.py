"""Another length of samples under way: nothing of an epoch is lost, and less than one sample a domain is read twice."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from megamix.data.blend.another_length import with_length
from megamix.data.blend.blend import Blend


def read_tokens(blend: Blend, number: int, length: int, counted: list[Counter[int]]) -> list[int]:
    """Takes ``number`` samples and counts the tokens read of each domain; returns the domains."""
    domains, samples = blend.take(number)
    for domain, sample in zip(domains.tolist(), samples.tolist(), strict=True):
        size = int(blend.num_samples[domain])
        pieces = [(sample * length, length)] if sample < size else blend.rests[domain].pieces(sample - size)
        assert sum(number for _, number in pieces) == length
        for first, number in pieces:
            counted[domain].update(range(first, first + number))
    return domains.tolist()


def again(blend: Blend) -> Blend:
    return Blend.from_state_dict(json.loads(json.dumps(blend.state_dict())))


@pytest.mark.parametrize("sampling", ["low_discrepancy", "iid"])
@pytest.mark.parametrize(
    ("before", "after"), [(6, 12), (6, 3), (6, 10), (10, 6), (7, 40), (40, 7), (5, 1), (1, 5), (6, 97)]
)
def test_an_epoch_ends_with_every_token_read_and_less_than_a_sample_twice(
    before: int, after: int, sampling: str
) -> None:
    """The tokens that each domain has read of its epoch, one by one: domains that were not read yet, that are in their
    first, second or third epoch, or at the start of one."""
    tokens = np.array([97, 130, 361, 1200])
    for taken in (0, 1, 23, 77) if sampling == "low_discrepancy" else (40,):
        blend = Blend(tokens // before, [0.4, 0.3, 0.3, 0.0], 5, sampling=sampling)  # type: ignore[arg-type]
        read_tokens(blend, taken, before, [Counter() for _ in tokens])
        counts, deficits = blend.counts, blend.deficits
        blend = again(with_length(blend, tokens, before, after))
        assert blend.position == taken
        assert blend.deficits * after == pytest.approx(deficits * before)
        blend.set_weights([0.25] * 4)
        for domain in range(4):
            # Alone, from here to the end of its epoch.
            begun, size = int(counts[domain]) % (int(tokens[domain]) // before), int(tokens[domain]) // after
            alone = again(blend)
            alone.set_weights(np.eye(4)[domain])
            alone = again(alone)
            seen = [Counter[int]() for _ in tokens]
            old = Blend(tokens // before, np.eye(4)[domain], 5)
            first = old.counts[domain] + int(counts[domain]) - begun
            _, windows = old.window(int(first), begun)
            for window in windows.tolist():
                seen[domain].update(range(window * before, (window + 1) * before))
            if begun == 0:
                assert domain not in alone.rests
                assert alone.counts[domain] % size == 0
                left = size
            else:
                left = alone.rests[domain].num_samples
            given = read_tokens(alone, left, after, seen)
            assert set(given) == {domain}
            number = sum(seen[domain].values())
            if begun == 0:
                assert (len(seen[domain]), number) == (size * after, size * after)
                continue
            assert sorted(seen[domain]) == list(range(tokens[domain])), "nothing is lost"
            assert number - tokens[domain] < after, "less than a sample is read twice"
            assert max(seen[domain].values()) <= 2
            # The next epoch is one of the new length, whole.
            following = [Counter[int]() for _ in tokens]
            read_tokens(alone, size, after, following)
            assert following[domain] == Counter(range(size * after))
            fresh = Blend(tokens // after, np.eye(4)[domain], 5)
            epochs = int(counts[domain]) // (int(tokens[domain]) // before) + 1
            expected = fresh.window(epochs * size, 2 * size)[1].tolist()
            assert expected == [*fresh.window(epochs * size, size)[1], *alone.take(size)[1]]
