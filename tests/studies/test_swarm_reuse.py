"""Mixture reuse: what is frozen and what is free, against full recomputation; chains of updates; their cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import known_law, mixtures
from typer.testing import CliRunner

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.studies.swarm.cli import app
from megamix.studies.swarm.fit.config import FitConfig
from megamix.studies.swarm.fit.fit import fit
from megamix.studies.swarm.fit.law import LogLinearLaw
from megamix.studies.swarm.fit.tables import write_metrics, write_ratios
from megamix.studies.swarm.propose.config import ProposeConfig, UpdateConfig
from megamix.studies.swarm.propose.proposal import Proposal, read_proposal, write_proposal
from megamix.studies.swarm.propose.propose import propose_in, propose_settled
from megamix.studies.swarm.propose.report import explain
from megamix.studies.swarm.propose.report import report as told
from megamix.studies.swarm.propose.reuse import EXISTING, Update, default_members, resolve_update
from megamix.studies.swarm.propose.solve import Problem, divergence, solve
from megamix.studies.swarm.update import cost, report

OLD = {"web": 0.5, "code": 0.3, "mail": 0.2, "law": 0.0}
TOKENS = {"web": 400.0, "code": 200.0, "mail": 100.0, "law": 100.0, "new": 200.0, "m1": 30.0, "m2": 70.0}


def plan(names: str, old: dict[str, float] | None = None, **update: Any) -> Update:
    """Of the domains ``names``, with blanks between, after an update of ``old``."""
    config = validate(UpdateConfig, {"previous": "runs/old", **update}, "update.yaml")
    return resolve_update(config, Proposal(old or OLD, {}), {name: TOKENS.get(name, 50.0) for name in names.split()})


def test_what_is_frozen_and_what_is_free() -> None:
    added = plan("web code mail law new", add=["new"])
    assert added.virtual == ("new", EXISTING)
    assert added.inner == {"web": 0.5, "code": 0.3, "mail": 0.2, "law": 0.0}
    assert added.prior == pytest.approx({"new": 0.2, EXISTING: 0.8})
    parts = plan("web code law m1 m2", partition={"mail": ["m1", "m2"]})
    assert parts.virtual == ("m1", "m2", EXISTING)
    assert parts.inner == pytest.approx({"web": 0.625, "code": 0.375, "law": 0})
    shared = plan("web code law m1 m2 new", partition={"mail": {"m1": 1, "m2": 3}}, add=["new"])
    assert shared.virtual == ("new", EXISTING)
    assert shared.inner == pytest.approx({"web": 0.5, "code": 0.3, "law": 0, "m1": 0.05, "m2": 0.15})
    partial = plan("web code mail law new", add=["new"], reuse="partial", unfreeze=["code", "law"])
    assert partial.virtual == ("code", "law", "new", EXISTING)
    assert partial.inner == pytest.approx({"web": 5 / 7, "mail": 2 / 7})
    anew = plan("web code mail law new", add=["new"], reuse="none")
    assert (anew.virtual, anew.inner) == (("web", "code", "mail", "law", "new"), {})
    assert anew.expand(np.eye(5)) == pytest.approx(np.eye(5))
    manual = plan("web code mail law new", add=["new"], existing_share=0.4)
    assert manual.prior == pytest.approx({"new": 0.6, EXISTING: 0.4})


def test_all_kinds_at_once() -> None:
    old = {"web": 0.4, "code": 0.3, "mail": 0.2, "law": 0.1}
    found = plan(
        "web law m1 m2 new wiki", {**old, "wiki": 0.1}, add=["new"], remove=["code"],
        partition={"mail": ["m1", "m2"]}, revise=["law"],
    )  # fmt: skip
    assert found.virtual == ("law", "m1", "m2", "new", EXISTING)
    assert found.inner == pytest.approx({"web": 0.8, "wiki": 0.2})
    real = found.expand(np.array([0.1, 0.2, 0.05, 0.15, 0.5]))
    assert dict(zip(found.domains, real, strict=True)) == pytest.approx(
        {"web": 0.4, "law": 0.1, "m1": 0.2, "m2": 0.05, "new": 0.15, "wiki": 0.1}
    )


def test_expanding_and_contracting() -> None:
    found = plan("web code mail law new", add=["new"])
    x = np.random.default_rng(0).dirichlet(np.ones(2), size=20)
    real = found.expand(x)
    assert real.sum(axis=1) == pytest.approx(np.ones(20))
    assert real[:, found.domains.index("code")] == pytest.approx(0.3 * x[:, 1])
    assert found.contract(real) == pytest.approx(x)
    assert found.contract(real[3]) == pytest.approx(x[3])
    real[4, 0] += 0.01
    real[4, 1] -= 0.01
    with pytest.raises(
        InputError, match=r"mixture 5: the weight of domain '(web|code)' is .*keep the ratios inside 'existing'"
    ):
        found.contract(real)
    with pytest.raises(InputError, match="of domain 'law'"):
        found.contract(np.array([0.0, 0.0, 0.0, 1.0, 0.0]))  # it has ratio 0


def test_the_cap_of_the_frozen_is_where_the_first_of_them_is_full() -> None:
    found = plan("web code mail law new", add=["new"])
    caps = {"web": 0.4, "code": 0.15, "mail": 0.9, "law": 0.0, "new": 0.7}
    virtual = found.caps(caps)
    assert virtual == pytest.approx({"new": 0.7, EXISTING: 0.5})
    assert found.binding(EXISTING, caps) == "code"
    for share in np.linspace(0, 1, 101):
        real = dict(zip(found.domains, found.expand(np.array([1 - share, share])), strict=True))
        fits = all(real[name] <= caps[name] + 1e-12 for name in found.inner)
        assert fits == (share <= virtual[EXISTING] + 1e-12)


@pytest.mark.parametrize(
    ("names", "update", "message"),
    [
        ("web code mail law", {}, "nothing changes"),
        (
            "web code mail law",
            {"remove": ["webb"]},
            r"remove: the mixture in runs/old has no domain 'webb'\. Did you mean 'web'",
        ),
        ("web code mail law", {"add": ["code"]}, "add: the mixture in runs/old has a domain 'code' already"),
        ("web code mail law", {"add": ["new"]}, r"the data does not have new; it has web, code, mail, law"),
        ("web code mail law new", {"remove": ["law"]}, "has law, which the update takes away; and new, which it does"),
        ("web mail law new", {"add": ["new"]}, r"does not have code.*Domains that are gone belong under remove: code"),
        ("web code law m1", {"partition": {"mail": ["m1", "m2"]}}, "does not have m2"),
        ("web code law m1", {"partition": {"mail": ["m1", "web"]}}, "partition: .* has a domain 'web' already"),
        ("web code law", {"partition": {"mail": []}}, r"'mail' has the parts \(\)"),
        ("web code law m1", {"partition": {"mail": {"m1": 0}}}, r"expected names, or shares above 0"),
        ("web code mail law", {"remove": ["law"], "revise": ["law"]}, r"'law' is named twice \(remove and revise\)"),
        ("web code law new", {"add": ["new"], "partition": {"mail": ["new"]}}, r"'new' is named twice"),
        ("web code mail law", {"revise": ["web"], "unfreeze": ["web"], "reuse": "partial"}, "named twice"),
        (
            "web code mail law",
            {"revise": ["web"], "unfreeze": ["code"]},
            "unfreeze names the old domains that reuse: partial",
        ),
        ("web code mail law", {"revise": ["web"], "reuse": "partial"}, "Give both or neither"),
        ("web code mail law existing", {"add": ["existing"]}, "a domain is called 'existing'"),
        ("web code mail law", {"revise": ["web"], "reuse": "none", "existing_share": 0.5}, "Leave existing_share out"),
        ("web code mail law", {"revise": ["web", "code", "mail"]}, r"would be frozen \(law\) all have weight 0"),
        ("web code mail law", {"revised": ["web"]}, r"unknown key 'revised'\. Did you mean 'revise'"),
    ],
)
def test_updates_that_cannot_be(names: str, update: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(names, **update)


def restricted(law: LogLinearLaw, found: Update, prior: np.ndarray, kl: float) -> tuple[Problem, Problem]:
    """The problem over all real domains, and that over the virtual ones of an update."""
    size, metrics = len(found.domains), len(law.metrics)
    v = np.full(metrics, 1 / metrics)
    whole = Problem(v, law.A_JK, kl, prior, np.zeros(size), np.ones(size))
    shares = dict(zip(found.domains, prior, strict=True))
    contracted = found.contract_prior(shares)
    inner = np.array([found.inner.get(name, 0.0) for name in found.domains])
    within = prior * (inner > 0) / prior[inner > 0].sum()
    q = np.array([contracted[name] for name in found.virtual])
    q[found.virtual.index(EXISTING)] *= np.exp(-divergence(inner, within))
    virtual = len(found.virtual)
    part = Problem(v, law.A_JK @ found.matrix.T, kl, q, np.zeros(virtual), np.ones(virtual))
    return whole, part


def test_the_virtual_problem_is_the_real_one_where_the_ratios_are_kept() -> None:
    """The same objective, the KL of the real domains included: so nothing but the freedom inside `existing` is lost."""
    law, found = known_law(5, 3), plan("web code mail law new", {**OLD, "law": 0.1}, add=["new"])
    prior = np.random.default_rng(1).dirichlet(np.ones(5))
    whole, part = restricted(law, found, prior, 0.3)
    for x in np.random.default_rng(2).dirichlet(np.ones(2), size=20):
        assert part.value(x) == pytest.approx(whole.value(found.expand(x)), abs=1e-12)


def test_full_reuse_against_recomputation() -> None:
    """Equal where the old ratios are those that recomputation finds; else worse by no more than the old ratios are; and
    never better."""
    law = known_law(5, 3)
    names, prior = ("web", "code", "mail", "law", "new"), np.full(5, 0.2)
    random = np.random.default_rng(5)
    for distance in (0.0, 0.02, 0.2):
        base = solve(Problem(np.full(3, 1 / 3), law.A_JK, 0.3, prior, np.zeros(5), np.ones(5))).x_K
        moved = base[:4] * np.exp(distance * random.normal(size=4))
        found = plan(" ".join(names), dict(zip(names, (moved / moved.sum()).tolist(), strict=False)), add=["new"])
        whole, part = restricted(law, found, prior, 0.3)
        lost = part.value(solve(part).x_K) - whole.value(base)
        assert lost >= -1e-10
        # The best with the frozen ratios is at least as good as the best mixture with its old part put in these ratios.
        start = whole.value(found.expand(np.array([base[4], base[:4].sum()])))
        assert lost <= start - whole.value(base) + 1e-10
        if distance == 0:
            assert lost == pytest.approx(0, abs=1e-10)
            assert found.expand(solve(part).x_K) == pytest.approx(base, abs=1e-6)


def swarm(folder: Path, law: LogLinearLaw, domains: tuple[str, ...], real: np.ndarray, ratios: np.ndarray) -> None:
    """The fit of a swarm whose runs have the law's values for ``real`` and stand as ``ratios`` in ratios.csv."""
    runs = tuple(f"{number:04d}" for number in range(len(real)))
    write_ratios(folder / "ratios.csv", runs, domains, ratios)
    write_metrics(folder / "metrics.csv", runs, law.metrics, law.predict(real))
    fit(folder / "ratios.csv", folder / "metrics.csv", folder, FitConfig(starts=2, folds=2, bootstrap=0))


def test_a_chain_of_updates(tmp_path: Path) -> None:
    """A first swarm, a domain added by full reuse, one removed, one split by full reuse: every weight follows from the
    record, and the swarm of the update finds what the true law says."""
    law = known_law(5, 2, seed=3)
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    for folder in (first, second, third):
        folder.mkdir()
    # Metrics of the old world do not know "new", whose weight is 0 there.
    names = ("web", "code", "mail", "law")
    ratios = mixtures(20, 4)
    swarm(first, law, names, np.pad(ratios, ((0, 0), (0, 1))), ratios)
    old, _ = propose_in(first, ProposeConfig(token_counts={name: TOKENS[name] for name in names}))
    update = UpdateConfig(previous=first, add=("new",))
    tokens = {name: TOKENS[name] for name in (*names, "new")}
    added = resolve_update(update, old, tokens)
    added.save(second)
    assert Update.open(second) == added
    virtual = mixtures(16, 2)
    swarm(second, law, added.virtual, added.expand(virtual), virtual)
    # Against the true law, by a fine grid over the one free number; the KL is that of the real domains.
    prior = np.array([tokens[name] for name in tokens]) / sum(tokens.values())
    best = 0.0
    for kl in (0.05, 0.5, 2.0):
        truth, _ = restricted(law, added, prior, kl)
        again, _ = propose_in(second, ProposeConfig(token_counts=tokens, kl=kl))
        best = min(np.linspace(0, 1, 20001), key=lambda x: truth.value(added.expand(np.array([x, 1 - x]))))
        assert again.weights["new"] == pytest.approx(best, abs=1e-3)
    assert 0.05 < best < 0.95
    found, path = propose_in(second, ProposeConfig(token_counts=tokens, target_tokens=1400))
    assert set(found.weights) == set(tokens)
    whole = sum(found.weights[name] for name in names)
    assert {name: found.weights[name] / whole for name in names} == pytest.approx(old.weights)
    assert sum(found.weights.values()) == pytest.approx(1)
    assert found.details["prior"]["source"] == str(second / "update.json")
    shown = told(found, path).text()
    assert f"{old.weights['code']:.4f}" in shown.split("after the update")[1]
    assert "frozen ratio" in shown
    zero = {**tokens, "web": 0.0}
    with pytest.raises(InputError, match=r"the share of 'web' is 0, but it has a weight in the old mixture"):
        propose_in(second, ProposeConfig(token_counts=zero))
    # A removal needs no runs.
    gone = resolve_update(
        UpdateConfig(previous=second, remove=("mail",)),
        read_proposal(second),
        {n: tokens[n] for n in tokens if n != "mail"},
    )
    assert gone.settled
    last, _ = propose_settled(third, gone)
    assert last.weights == pytest.approx(
        {n: w / (1 - found.weights["mail"]) for n, w in found.weights.items() if n != "mail"}
    )
    assert [(Path(entry["directory"]).name, entry["runs"]) for entry in last.history] == [
        ("first", 20),
        ("second", 16),
        ("third", 0),
    ]
    assert read_proposal(third) == last
    for before, after in zip(last.history, last.history[1:], strict=False):
        assert after["update"]["weights_before"] == before["weights"]
    text = explain(last).text()
    assert "update of" in text
    assert "36 proxy runs in all" in text
    words = explain(last, "code").text()
    ratio = old.weights["code"]
    assert f"{found.weights['code']:.4f} = {whole:.4f} of 'existing' x {ratio:.4f}" in words
    assert "has no domain 'mail'" in explain(last, "mail").text()
    with pytest.raises(InputError, match=r"no mixture in the chain has a domain 'cod'\. Did you mean 'code'"):
        explain(last, "cod")


def test_a_fit_of_other_virtual_domains_is_refused(tmp_path: Path) -> None:
    law = known_law(2, 2)
    ratios = mixtures(8, 2)
    swarm(tmp_path, law, ("d0", "d1"), ratios, ratios)
    plan("web code mail law new", add=["new"]).save(tmp_path)
    with pytest.raises(InputError, match=r"update\.json is of the domains new, existing, the fit of d0, d1"):
        propose_in(tmp_path, ProposeConfig())
    (tmp_path / "update.json").write_text('{"domains": []}')
    with pytest.raises(InputError, match=r"update\.json is not what"):
        propose_in(tmp_path, ProposeConfig())


def test_the_cost_against_full_recomputation() -> None:
    assert [default_members(number) for number in (1, 2, 3, 4, 12, 24)] == [0, 16, 16, 20, 60, 120]
    names = [f"d{number}" for number in range(24)]
    old = dict.fromkeys(names, 1 / 24)
    found = plan(" ".join([*names, "new"]), old, add=["new"])
    assert cost(found, 1e6).rows == [
        ("this update (reuse: full)", "2", "16", "16,000,000", "13%"),
        ("full recomputation", "25", "125", "125,000,000", "100%"),
    ]
    removed = plan(" ".join(names[1:]), old, remove=["d0"])
    assert cost(removed).rows[0] == ("this update (reuse: full)", "1", "0", "-", "0%")
    assert "existing" in report(found).text()


def test_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    old, out = tmp_path / "old", tmp_path / "out"
    old.mkdir()
    write_proposal(old, Proposal({"web": 0.6, "code": 0.4}, {}))
    priors = tmp_path / "priors.json"
    priors.write_text(
        json.dumps({"token_counts": {"web": 10, "new": 30}, "relative_sizes": {"web": 0.25, "new": 0.75}})
    )
    config = tmp_path / "update.yaml"
    config.write_text(f"previous: {old}\nadd: [new]\nremove: [code]\n")
    shown = run(app, ["update", str(config), str(priors), "--out", str(out), "--tokens-per-run", "1e6"])
    assert shown.exit_code == 0, shown.output
    assert "16,000,000" in shown.output
    found = Update.open(out)
    assert found is not None
    assert (found.virtual, found.inner) == (("new", EXISTING), {"web": 1.0})
    assert not (out / "mixture.json").exists()
    config.write_text(f"previous: {old}\nremove: [code]\n")
    priors.write_text(json.dumps({"token_counts": {"web": 10}}))
    shown = run(app, ["update", str(config), str(priors), "--out", str(out)])
    assert "the mixture is in" in shown.output
    assert read_proposal(out).weights == {"web": 1.0}
    assert "1.0000*" in run(app, ["explain", str(out)]).output
