"""Overlap of domains against the formula, counted in dictionaries, and on text whose overlap is known."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megamix.data.overlap import WINDOW, domain_overlap
from megamix.data.tokens.stream import DomainTokens
from megamix.data.tokens.writer import IndexedWriter

VOCAB = 40


def domain(folder: Path, name: str, tokens: np.ndarray) -> DomainTokens:
    with IndexedWriter(folder / name, np.uint16) as writer:
        for document in np.array_split(tokens, max(1, tokens.size // 1000)):
            writer.add_document(document)
    return DomainTokens(name, [folder / name])


def chain(seed: int, length: int, shared: np.ndarray | None = None) -> np.ndarray:
    """Tokens of a Markov chain whose every token has three likely followers, those of ``shared`` where it is given."""
    rng = np.random.default_rng(seed)
    followers = rng.integers(0, VOCAB, (VOCAB, 3)) if shared is None else shared
    tokens = [0]
    for _ in range(length - 1):
        likely = rng.random() < 0.9
        tokens.append(int(followers[tokens[-1], rng.integers(3)] if likely else rng.integers(VOCAB)))
    return np.array(tokens, np.uint16)


def reference(domains: list[np.ndarray]) -> np.ndarray:
    """The formula in dictionaries and floats, on domains small enough that every window is in the sample."""
    counted, predicted = [], []
    for tokens in domains:
        windows = tokens[: tokens.size // WINDOW * WINDOW].reshape(-1, WINDOW).tolist()
        counted.append([window for i, window in enumerate(windows) if i % 10 != 1])
        predicted.append([window for i, window in enumerate(windows) if i % 10 == 1])

    def unigrams(windows: list[list[int]]) -> list[float]:
        counts = Counter(token for window in windows for token in window)
        return [counts[token] / sum(counts.values()) for token in range(VOCAB)]

    own = [unigrams(windows) for windows in counted]
    everywhere = [sum(u[t] for u in own) / len(own) + 1e-6 / VOCAB for t in range(VOCAB)]
    everywhere = [p / sum(everywhere) for p in everywhere]

    def loss(i: int, j: int, share: float) -> float:
        pairs = Counter((a, b) for window in counted[j] for a, b in pairwise(window))
        first, kinds = Counter(), Counter()
        for (a, _), count in pairs.items():
            first[a] += count
            kinds[a] += 1
        total, number = 0.0, 0
        for window in predicted[i]:
            for a, b in pairwise(window):
                unigram = 0.9 * own[j][b] + 0.1 * everywhere[b]
                p = (pairs[a, b] + (kinds[a] + 1) * unigram) / (first[a] + kinds[a] + 1)
                total -= math.log(share * p + (1 - share) * everywhere[b])
                number += 1
        return total / number

    shares = (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95)
    k = len(domains)
    saved = np.array([[loss(i, j, 0) - min(loss(i, j, share) for share in shares) for j in range(k)] for i in range(k)])
    return np.clip(saved / np.diag(saved)[:, None], 0, 1)


def test_the_formula(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    followers = rng.integers(0, VOCAB, (VOCAB, 3))
    half = followers.copy()
    half[::2] = rng.integers(0, VOCAB, (VOCAB // 2, 3))
    texts = [chain(1, 12 * WINDOW, followers), chain(2, 14 * WINDOW + 9, half), chain(3, 11 * WINDOW)]
    found = domain_overlap([domain(tmp_path, f"d{i}", text) for i, text in enumerate(texts)], VOCAB)
    np.testing.assert_allclose(found, reference(texts), rtol=1e-10, atol=1e-12)
    assert 0.1 < found[0, 1] < 0.9


def test_the_same_text_overlaps_fully_and_noise_with_nothing(tmp_path: Path) -> None:
    followers = np.random.default_rng(5).integers(0, VOCAB, (VOCAB, 3))
    noise = np.random.default_rng(6).integers(0, VOCAB, 300 * WINDOW).astype(np.uint16)
    texts = [chain(1, 300 * WINDOW, followers), chain(2, 300 * WINDOW, followers), noise]
    found = domain_overlap([domain(tmp_path, f"d{i}", text) for i, text in enumerate(texts)], VOCAB)
    assert found[0, 1] == pytest.approx(1, abs=0.02)
    assert found[1, 0] == pytest.approx(1, abs=0.02)
    assert found[2].tolist() == [0, 0, 1]
    assert found[:2, 2] == pytest.approx(0, abs=0.02)


def test_a_domain_too_small_to_compare_overlaps_with_none(tmp_path: Path) -> None:
    texts = [chain(1, 20 * WINDOW), chain(1, WINDOW + 1)]
    found = domain_overlap([domain(tmp_path, f"d{i}", text) for i, text in enumerate(texts)], VOCAB)
    assert found.tolist() == [[1, 0], [0, 1]]
    assert domain_overlap([domain(tmp_path, "one", texts[0])], VOCAB).tolist() == [[1]]
