"""Mixers that only log: they change nothing, and their lines are those of a run that had them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from records import lines, record, samples
from small_config import small
from studied_runs import HALF, LAG, NAMES, SHADOWS, STEPS, studied_runs

from megamix.core.errors import InputError
from megamix.mixing.mixers import DomainStats, make_mixer
from megamix.mixing.shadow import shadow_names


@pytest.fixture(scope="module")
def runs(data_dir: Path) -> Path:
    return studied_runs(data_dir)


def test_shadows_change_nothing(runs: Path) -> None:
    """The same record, the same samples, and the same weights of the model to the last bit."""
    assert record(runs / "shadowed") == record(runs / "plain")
    assert samples(runs / "shadowed") == samples(runs / "plain")
    assert not (runs / "plain" / "shadow").exists()
    checkpoint = f"checkpoints/step_{STEPS}/layers"
    for path in sorted((runs / "plain" / checkpoint).iterdir()):
        assert (runs / "shadowed" / checkpoint / path.name).read_bytes() == path.read_bytes(), path.name


def test_lines_are_those_of_a_run(runs: Path) -> None:
    """The shadow with the run's own mixer writes weights.jsonl once more, constraints, stages and announcements
    included."""
    own = lines(runs / "shadowed" / "weights.jsonl")
    assert lines(runs / "shadowed" / "shadow" / "odm-official.jsonl") == own
    assert [line["step"] for line in own] == [0, 2, *range(5, STEPS + 1)]
    assert min(min(line["domain_weights"]) for line in own) == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize("index", [0, 1])
def test_weights_follow_from_the_runs_statistics(runs: Path, index: int) -> None:
    """A mixer fed by hand from the record asks for the same; both update at every step, and the floor of 0.2 leaves the
    order of the weights above it."""
    run = runs / "shadowed"
    own = lines(run / "weights.jsonl")
    names = own[0]["domain_names"]
    used = [next(line for line in reversed(own) if line["effective_step"] <= step) for step in range(STEPS)]
    with (run / "statistics" / "from_000000001.bin").open("rb") as file:
        assert json.loads(file.readline()) == {
            "first_step": 1, "domain_names": names, "columns": ["nats", "tokens"],
        }  # fmt: skip
        content = file.read()
    rows = np.frombuffer(content, "<f8").reshape(STEPS, 2, len(names))
    counts = np.frombuffer(content, "<i8").reshape(STEPS, 2, len(names))[:, 1]
    mixer = make_mixer(SHADOWS[index], names, used[0]["domain_weights"])
    shadow = lines(run / "shadow" / f"{NAMES[index]}.jsonl")
    assert [line["step"] for line in shadow] == list(range(STEPS + 1))
    for step, line in enumerate(shadow[1:]):
        drawn_with = used[step]["domain_weights"]
        asked = mixer.update(DomainStats(rows[step, 0], counts[step], weights=drawn_with), step + 1)
        given = np.array(line["domain_weights"])
        assert line["effective_step"] == step + 1 + LAG
        # Within the floor: the wish, scaled, where it is above the floor.
        free = given > 0.2 + 1e-12
        assert free.any()
        np.testing.assert_allclose(given[free] / given[free].sum(), asked[free] / asked[free].sum(), rtol=1e-12)
        assert line["statistics"] == {"nats": rows[step, 0].tolist(), "tokens": counts[step].tolist()}
        assert {key: line[key] for key in mixer.record()} == mixer.record()


def test_the_statistics_are_those_on_record(runs: Path) -> None:
    """Their sums are the intervals' in metrics.jsonl."""
    from megamix.training.records.step_statistics import read_statistics

    found = read_statistics(runs / "shadowed")
    train = [line for line in lines(runs / "shadowed" / "metrics.jsonl") if line["event"] == "train"]
    assert [line["step"] for line in train] == [5, 10, 12]
    for line, before in zip(train, (0, 5, 10), strict=True):
        nats, tokens = (part[before : line["step"]].sum(axis=0) for part in (found.nats, found.tokens))
        assert line["domain_tokens"] == dict(zip(found.domain_names, tokens.tolist(), strict=True))
        assert list(line["domain_loss"].values()) == pytest.approx((nats / tokens).tolist(), rel=1e-12)


def test_stop_and_resume(runs: Path) -> None:
    """Shadows and statistics of a run in two halves are those of the whole, to the last bit."""
    for name in NAMES:
        assert lines(runs / "halves" / "shadow" / f"{name}.jsonl") == lines(
            runs / "shadowed" / "shadow" / f"{name}.jsonl"
        )
    file = "statistics/from_000000001.bin"
    assert (runs / "halves" / file).read_bytes() == (runs / "shadowed" / file).read_bytes()
    assert record(runs / "halves") == record(runs / "plain")


def test_other_shadows_on_resume(runs: Path) -> None:
    """One that is kept goes on, one that is left out ends, and one with another config begins anew, from the weights in
    effect."""
    assert record(runs / "other") == record(runs / "plain")
    kept, ended, new = (
        lines(runs / "other" / "shadow" / f"{name}.jsonl") for name in NAMES[:1] + NAMES[2:] + ["doremi"]
    )
    assert kept == lines(runs / "shadowed" / "shadow" / "odm-paper.jsonl")
    assert ended == [line for line in lines(runs / "shadowed" / "weights.jsonl") if line["step"] <= HALF]
    begun = [line for line in new if "change" in line]
    used = lines(runs / "plain" / "weights.jsonl")
    # Those in effect, and those announced: step 6 is the first whose losses moved the weights, LAG steps later.
    assert [(line["step"], line["effective_step"]) for line in begun] == [(HALF, HALF), (HALF, HALF + LAG)]
    assert begun[0]["domain_weights"] == [0.25] * 4
    assert begun[1]["domain_weights"] == next(line["domain_weights"] for line in used if line["step"] == HALF)
    assert {line["step"] for line in new if "loss_weights" in line} == set(range(HALF, STEPS + 1))


def test_names() -> None:
    shadow = small("shadow=[{name: odm}, {name: odm, preset: paper}, {name: odm, alpha: 0.5}, {name: doremi}]").shadow
    assert shadow_names(shadow) == ["odm-official", "odm-paper", "odm-official-2", "doremi"]


def test_a_shadow_cannot_read_reference_losses_of_its_own() -> None:
    with pytest.raises(InputError, match="shadow's reference is cache, but the run's mixer reads no reference losses"):
        small("shadow=[{name: doremi, reference: cache}]")
    given = small("shadow=[{name: doremi, reference: cache, eta: 2}]", "mixer={name: doremi, reference: cache}")
    assert len(given.shadow) == 1
