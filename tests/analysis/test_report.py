"""The HTML report: its numbers against the record's, its words on runs that differ, and its form."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from recorded_runs import BATCH, NAMES, SEQ, STEPS, TRAIN_TOKENS, write_data, write_run
from report_pages import Page, data_of, lines_of, rewrite

from megamix.analysis import palette, report
from megamix.analysis.report import write_report
from megamix.analysis.report.svg import HEIGHT, WIDTH, nice_axis
from megamix.analysis.summary import DomainRow, RunTable
from megamix.core.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pile"
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], str]:
    """A run, the samples it took of each domain, and its page."""
    run = tmp_path_factory.mktemp("runs") / "first"
    counts = write_run(run, data)
    return run, counts[STEPS], write_report([run]).read_text(encoding="utf-8")


# Numbers. ------------------------------------------------------------------------------------------------------------


def test_the_weights_of_the_page_are_those_of_the_ledger(one: tuple[Path, list[int], str]) -> None:
    run, _, text = one
    drawn = data_of(text)["weights:0"]
    # The change of the last step would act after the run.
    lines = [line for line in lines_of(run, "weights.jsonl") if line["position"] <= STEPS * BATCH]
    assert [name for name, _ in drawn["rows"]] == list(NAMES)
    assert drawn["x"][0] == [*(line["position"] * SEQ for line in lines), STEPS * BATCH * SEQ]
    for k, column in enumerate(drawn["y"]):
        wanted = [line["domain_weights"][k] for line in [*lines, lines[-1]]]
        assert column == pytest.approx(wanted, rel=1e-5)


def test_the_losses_of_the_page_are_those_of_the_record(one: tuple[Path, list[int], str]) -> None:
    run, _, text = one
    evaluations = [line for line in lines_of(run, "metrics.jsonl") if line["event"] == "evaluate"]
    drawn = data_of(text)
    for name in NAMES:
        assert drawn[f"loss:{name}"]["x"] == [[line["tokens"] for line in evaluations]]
        assert drawn[f"loss:{name}"]["y"] == [[line["domain_loss"][name] for line in evaluations]]
    assert drawn["mean:macro"]["y"] == [[line["macro_loss"] for line in evaluations]]
    assert drawn["mean:worst"]["y"] == [[max(line["domain_loss"].values()) for line in evaluations]]
    shares = dict(zip(NAMES, np.array(TRAIN_TOKENS) / sum(TRAIN_TOKENS), strict=True))
    objective = [sum(shares[name] * line["domain_loss"][name] for name in NAMES) for line in evaluations]
    assert drawn["mean:objective"]["y"][0] == pytest.approx(objective, rel=1e-5)
    page = Page(text)
    assert page.values("objective") == pytest.approx(objective[-1:])
    assert page.values("macro") == [evaluations[-1]["macro_loss"]]
    assert page.values("worst") == [max(evaluations[-1]["domain_loss"].values())]
    assert page.values("first_loss") == list(evaluations[0]["domain_loss"].values())
    assert page.values("last_loss") == list(evaluations[-1]["domain_loss"].values())


def test_shares_and_epochs_of_the_table(one: tuple[Path, list[int], str]) -> None:
    run, counts, text = one
    page = Page(text)
    assert page.values("realised_share") == (np.array(counts) / sum(counts)).tolist()
    assert page.values("epochs") == (np.array(counts) / ((np.array(TRAIN_TOKENS) - 1) // SEQ)).tolist()
    # The mean weight, sample by sample.
    weights = np.zeros((STEPS * BATCH, 3))
    for line in lines_of(run, "weights.jsonl"):
        weights[line["position"] :] = line["domain_weights"]
    assert page.values("asked") == pytest.approx(weights.mean(axis=0).tolist(), rel=1e-12)
    assert page.values("final_weight") == lines_of(run, "weights.jsonl")[-1]["domain_weights"]


def test_a_drawn_line_has_the_values_of_the_data(one: tuple[Path, list[int], str]) -> None:
    """The path of a weight is taken apart and held against the data."""
    _, _, text = one
    drawn = data_of(text)["weights:0"]
    path = re.findall(r'<path class="line d0" data-d="d0" d="([^"]+)"', text)[0]
    start = re.match(r"M(\d+) (\d+)", path)
    assert start is not None
    x, y = int(start[1]), int(start[2])
    corners = [(x, y)]
    for kind, length in re.findall(r"([hv])(-?\d+)", path):
        x, y = (x + int(length), y) if kind == "h" else (x, y + int(length))
        corners.append((x, y))
    tokens, weights = np.array(drawn["x"][0]), np.array(drawn["y"][0])
    assert corners[0][0] == 0
    assert corners[-1][0] == WIDTH
    # Where the line stands when a weight begins to act is the weight, up to a linear scale of the axis.
    starts = np.rint(tokens / tokens[-1] * WIDTH)
    heights = [next(y for x, y in reversed(corners) if x <= start) for start in starts]
    slope, offset = np.polyfit(weights, heights, 1)
    assert slope < 0
    assert offset == pytest.approx(HEIGHT, abs=2)
    assert np.abs(slope * weights + offset - heights).max() < 1.5


# Form. ---------------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_is_well_formed(one: tuple[Path, list[int], str]) -> None:
    text = one[2]
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not any(given.keys() & {"src", "srcset"} or tag in ("link", "img", "iframe") for tag, given in page.elements)
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len(set(ids))
    targets = {given["href"][1:] for tag, given in page.elements if tag == "a"}
    assert targets <= page.ids()
    assert {"loss", "weights", "domains", "shares", "epochs", "table", "config"} <= page.ids()
    drawings = [given for tag, given in page.elements if tag == "svg" and "viewbox" in given]
    assert len(drawings) == 2 + 3 + 3
    assert all(given["role"] == "img" and given["aria-label"] for given in drawings)
    assert set(data_of(text)) == {given["data-chart"] for _, given in page.elements if "data-chart" in given}


def test_names_are_text_and_not_markup(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "a&b<i>"
    write_run(run, data)
    for file in ("weights.jsonl", "metrics.jsonl"):
        (run / file).write_text((run / file).read_text().replace('"web"', '"</script><b>\\"&"'))
    text = write_report([run], tmp_path / "page.html").read_text()
    assert "</script><b>" not in text
    assert "<b>&quot;" not in text
    assert "a&amp;b&lt;i&gt;" in text
    assert data_of(text)["weights:0"]["rows"][0][0] == '</script><b>"&'
    Page(text)


def luminance(colour: str) -> float:
    """WCAG 2.1, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(
        share * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
        for share, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )


def oklab(colour: str) -> np.ndarray:
    """Ottosson (2020)."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
              [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
              [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ linear)


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_stand_out_from_the_page_and_from_each_other(theme: int) -> None:
    page = luminance(palette.PAGE[theme])
    for colours in (palette.DOMAINS, palette.RUNS):
        for pair in colours:
            low, high = sorted((page, luminance(pair[theme])))
            assert (high + 0.05) / (low + 0.05) >= 3.0
    places = [oklab(pair[theme]) for pair in palette.DOMAINS]
    assert len(places) == 30
    nearest = min(float(np.linalg.norm(a - b)) for i, a in enumerate(places) for b in places[:i])
    assert nearest > 0.075
    css = (Path(report.__file__).parent / "report.css").read_text()
    assert re.findall(r"--card:(#\w+)", css)[theme] == palette.PAGE[theme]


@pytest.mark.parametrize("inside", [False, True])
def test_axes_have_round_ticks(inside: bool) -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        low = float(rng.normal(scale=10.0 ** rng.integers(-3, 4)))
        high = low + float(10.0 ** rng.uniform(-4, 4))
        axis = nice_axis(low, high, 4, inside)
        assert 2 <= len(axis.ticks) <= 10
        ends = (low, high) if inside else (axis.ticks[0], axis.ticks[-1])
        assert (axis.low, axis.high) == pytest.approx(ends)
        assert axis.low <= low + 1e-9 * abs(low)
        assert axis.high >= high - 1e-9 * abs(high)
        steps = [right - left for left, right in pairwise(axis.ticks)]
        assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
        lead = steps[0] / 10.0 ** np.floor(np.log10(steps[0]) + 1e-9)
        assert min(abs(lead - factor) for factor in (1, 2, 2.5, 5)) < 1e-3


def test_no_loss_is_cut_off_and_the_top_of_every_axis_has_a_number(data: Path, tmp_path: Path) -> None:
    """Training losses far above the validation losses, from the first evaluation after the start on."""
    write_run(tmp_path, data)
    metrics = lines_of(tmp_path, "metrics.jsonl")
    for line in metrics:
        if line["event"] == "train":
            line["domain_loss"]["web"] = 30.0 if line["step"] < 20 else 9.0 - line["step"] / 100
    rewrite(tmp_path, "metrics.jsonl", metrics)
    text = write_report([tmp_path]).read_text()
    assert "<svg width" not in text, "no picture inside of a picture, which would cut"
    figures = re.findall(r'<figure class="chart.*?</figure>', text, re.DOTALL)
    assert len(figures) == 2 + 3 + 3  # weights, means (none by natural share), domains
    for figure in figures:
        assert figure.count("bottom:100%") == 1
    (web,) = (figure for figure in figures if "web: validation loss" in figure)
    path = re.findall(r'<path class="thin r0" d="M(\d+) (\d+)([^"]*)"', web)
    assert len(path) == 1
    heights = np.cumsum([int(path[0][1]), *(int(dy) for dy in re.findall(r"l-?\d+ (-?\d+)", path[0][2]))])
    assert len(heights) == 5  # of steps 20 to 40
    top = float(re.findall(r'bottom:100%">([\d.]+)<', web)[0])
    bottom = float(re.findall(r'bottom:0%">([\d.]+)<', web)[0])
    wanted = [9.0 - step / 100 for step in range(20, 41, 5)]
    assert top < 30
    assert bottom + (1 - heights / HEIGHT) * (top - bottom) == pytest.approx(wanted, abs=(top - bottom) / HEIGHT)


# Several runs, and runs that lack something. -------------------------------------------------------------------------


def test_several_runs_are_laid_over_each_other(data: Path, one: tuple[Path, list[int], str], tmp_path: Path) -> None:
    run = one[0]
    write_run(tmp_path / "other", data, steps=20)
    metrics = lines_of(tmp_path / "other", "metrics.jsonl")
    worse = [{**line, "domain_loss": {k: v and v + 0.5 for k, v in line["domain_loss"].items()}} for line in metrics]
    rewrite(tmp_path / "other", "metrics.jsonl", worse)
    path = tmp_path / "other" / "config.resolved.yaml"
    config = yaml.safe_load(path.read_text())
    config["mixer"]["preset"] = "paper"
    path.write_text(yaml.safe_dump(config))
    text = write_report([run, tmp_path / "other"], tmp_path / "page.html").read_text()
    drawn, page = data_of(text), Page(text)
    assert [name for name, _ in drawn["loss:web"]["rows"]] == ["first", "other"]
    assert [len(tokens) for tokens in drawn["loss:web"]["x"]] == [3, 2]
    assert (
        "<b>first</b> has the lowest loss by the objective (natural), 0.5 nats per token below <b>other</b> at " in text
    )
    assert "at 2.56k tokens, the most after which all were evaluated." in text
    assert len(page.values("last_loss")) == 6
    last = [lines_of(path, "metrics.jsonl")[-1]["domain_loss"] for path in (run, tmp_path / "other")]
    assert page.values("against") == [last[1][name] - last[0][name] for name in NAMES]
    keys = [row[0]["text"] for row in page.rows if row[0]["text"].startswith("mixer.")]
    assert set(keys) == {
        "mixer.preset", "mixer.reward", "mixer.importance_weighting", "mixer.policy", "mixer.reward_over", "mixer.estimate_in_warmup",
    }  # fmt: skip


def test_runs_with_other_domains(data: Path, one: tuple[Path, list[int], str], tmp_path: Path) -> None:
    run = tmp_path / "other"
    write_run(run, data)
    for file in ("weights.jsonl", "metrics.jsonl"):
        (run / file).write_text((run / file).read_text().replace('"web"', '"law"'))
    text = write_report([one[0], run], tmp_path / "page.html").read_text()
    assert "The runs share 2 of 4 domains (only first has web; only other has law)" in text
    assert "has the lowest mean loss" not in text
    drawn = data_of(text)
    assert [name for name, _ in drawn["loss:web"]["rows"]] == ["first"]
    assert [name for name, _ in drawn["loss:law"]["rows"]] == ["other"]
    assert [name for name, _ in drawn["loss:_books"]["rows"]] == ["first", "other"]
    # The same domain has the same colour in every run.
    looks = [dict(drawn[f"weights:{index}"]["rows"]) for index in (0, 1)]
    assert looks[0]["_books"] == looks[1]["_books"]
    assert looks[0]["web"] != looks[1]["law"]
    assert "not in other" in text
    Page(text)


def test_a_run_without_evaluations(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path, data)
    rewrite(tmp_path, "metrics.jsonl", [m for m in lines_of(tmp_path, "metrics.jsonl") if m["event"] == "train"])
    text = write_report([tmp_path]).read_text()
    page = Page(text)
    assert "Not evaluated yet" in text
    assert page.values("macro") == []
    assert page.values("last_loss") == []
    assert "weights:0" in data_of(text)
    rewrite(tmp_path, "metrics.jsonl", [])
    Page(write_report([tmp_path]).read_text())


def test_without_the_data_set(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path, data)
    config = tmp_path / "config.resolved.yaml"
    config.write_text(config.read_text().replace(str(data), "gone"))
    text = write_report([tmp_path]).read_text()
    assert "natural shares, epochs and unigram losses are not known here" in text
    assert "epochs" not in Page(text).ids()
    assert len(Page(text).values("realised_share")) == 3


def test_what_the_mixer_records_of_itself(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path, data)
    lines = lines_of(tmp_path, "weights.jsonl")
    for index, line in enumerate(lines):
        line["exploration_rate"] = 1 / (index + 3)
        line["perdomain_scores"] = [0.1 * index, 0.5, None if index < 4 else 2.0]
        line["loss_weights"] = [0.2, 0.3, 0.5]
    lines[1]["statistics"]["tokens"][1] = 0
    rewrite(tmp_path, "weights.jsonl", lines)
    text = write_report([tmp_path]).read_text()
    drawn = data_of(text)
    acting = [line for line in lines if line["position"] <= STEPS * BATCH]
    rates = [float(f"{line['exploration_rate']:.6g}") for line in [*acting, acting[-1]]]
    assert drawn["exploration"]["y"] == [rates]
    # The first line follows from no step.
    assert drawn["perdomain_scores:0"]["x"][0] == [line["position"] * SEQ for line in acting[1:]]
    assert drawn["perdomain_scores:0"]["y"][0] == pytest.approx([0.1 * index for index in range(1, len(acting))])
    assert drawn["perdomain_scores:0"]["y"][1] == [None, *[0.5] * (len(acting) - 2)]  # not seen in the first step
    assert drawn["perdomain_scores:0"]["y"][2][:4] == [None, None, None, 2.0]
    assert drawn["alpha:0"]["y"] == [[w] * len(drawn["alpha:0"]["x"][0]) for w in (0.2, 0.3, 0.5)]
    Page(text)


def test_bad_input(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run given"):
        write_report([])
    write_run(tmp_path / "run", data, steps=20)
    with pytest.raises(InputError, match="is a folder"):
        write_report([tmp_path / "run"], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_report([tmp_path / "run"], tmp_path / "file" / "page.html")


def test_domains_in_no_evaluation_are_named_and_in_no_mean(tmp_path: Path) -> None:
    def row(name: str, share: float, loss: float | None) -> DomainRow:
        return DomainRow(name, share, 0.5, 0.5, 0.5, loss, loss, None, 1.0, evaluated=loss is not None)

    rows = [row("web", 0.6, 2.0), row("code", 0.2, 4.0), row("law", 0.2, None)]
    table = RunTable(tmp_path, 5, 5, 100, rows, {"web": 0.25, "code": 0.75}, "as given")
    means = (table.by_objective("last_loss"), table.macro("last_loss"), table.by_natural_share("last_loss"))
    assert means == pytest.approx((3.5, 3.0, 2.5), rel=1e-14)
    assert "Without validation text, and so in no evaluation: law." in table.report().text()
