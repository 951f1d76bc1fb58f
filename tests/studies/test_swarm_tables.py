"""ratios.csv and metrics.csv: every form Olmix writes them in, and every way in which they cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.studies.swarm.fit.tables import read_table, write_metrics, write_ratios

RATIOS = "run,name,index,web,dclm:math\na,A,0,0.25,0.75\nb,B,1,1,0\nc,C,2,0.5,0.5\n"
METRICS = "run,name,index,loss,acc::olmes\na,A,0,2.5,0.1\nb,B,1,3.5,0.2\nc,C,2,4.5,0.3\n"


def files(folder: Path, ratios: str = RATIOS, metrics: str = METRICS) -> tuple[Path, Path]:
    paths = folder / "ratios.csv", folder / "metrics.csv"
    for path, text in zip(paths, (ratios, metrics), strict=True):
        path.write_bytes(text.encode("utf-8"))
    return paths


@pytest.mark.parametrize(
    ("ratios", "metrics"),
    [
        (RATIOS, METRICS),
        ("run_id,web,dclm:math\na,0.25,0.75\nb,1,0\nc,0.5,0.5", "loss,acc::olmes,run_id\n2.5,.1,a\n3.5,.2,b\n4.5,.3,c"),
        (f"\ufeff,{RATIOS}".replace("\n", "\n0,", 3), f"Unnamed: 0,{METRICS}".replace("\n", "\n0,", 3)),
        (RATIOS.replace("\n", "\r\n"), METRICS.replace("\n", "\r\n") + "\r\n"),
        # Rows in another order belong to the same runs; sums of 0.9995 and 1.0008 are made 1.
        ("run,web,dclm:math\na,.249875,.749625\nb,1.0008,0\nc,.5,.5\n", "run,loss,acc::olmes\nc,4.5,.3\nb,3.5,.2\na,2.5,.1\n"),
    ],
)  # fmt: skip
def test_the_forms_of_a_table(tmp_path: Path, ratios: str, metrics: str) -> None:
    table = read_table(*files(tmp_path, ratios, metrics))
    assert (table.runs, table.domains, table.metrics) == (("a", "b", "c"), ("web", "dclm:math"), ("loss", "acc::olmes"))
    assert table.ratios_RK == pytest.approx(np.array([[0.25, 0.75], [1, 0], [0.5, 0.5]]), abs=1e-12)
    assert table.values_RJ.tolist() == [[2.5, 0.1], [3.5, 0.2], [4.5, 0.3]]
    assert table.ratios_RK.dtype == table.values_RJ.dtype == np.float64
    assert table.dropped == ()


@pytest.mark.parametrize(
    ("ratios", "metrics", "message"),
    [
        (RATIOS.replace("0.25,0.75", "0.25,0.70"), METRICS, r"1 run do not sum to 1 \(within 0.001\): a \(0.95\)"),
        (RATIOS.replace("0.25,0.75", "-0.25,1.25"), METRICS, "line 2: run a has the ratio -0.25 of 'web'"),
        (RATIOS.replace("0.25,0.75", "nan,0.75"), METRICS, "line 2: run a has the ratio nan of 'web'"),
        (RATIOS.replace("0.25,0.75", ",0.75"), METRICS, "line 2: run a has the ratio nan of 'web'"),
        (RATIOS.replace("0.25,0.75", "inf,0.75"), METRICS, "run a has the ratio nan of 'web'"),
        (
            RATIOS.replace("0.25", "a quarter"),
            METRICS,
            r"line 2 \(run a\): domain 'web' is 'a quarter', expected a number",
        ),
        (RATIOS, METRICS.replace("2.5", "2,5"), "line 2 has 6 fields, the header 5"),
        (RATIOS, METRICS[:-8], "line 4 has 4 fields, the header 5: the file is cut off"),
        (RATIOS.replace("c,C", "a,C"), METRICS, "has the run 'a' twice, on lines 2 and 4"),
        (RATIOS.replace("c,C", ",C"), METRICS, "line 4: the run has no name"),
        (RATIOS + "d,D,3,1,0\n", METRICS, r"1 run cannot be used: d \(not in metrics.csv\)"),
        (RATIOS, METRICS + "e,E,3,1,1\n", r"1 run cannot be used: e \(not in ratios.csv\)"),
        (RATIOS, METRICS.replace("2.5", "").replace("0.2", "NaN"), r"2 runs .* a \(no loss\), b \(no acc::olmes\)"),
        (RATIOS, METRICS.replace("4.5", "-inf"), r"1 run cannot be used: c \(no loss\)"),
        (RATIOS, METRICS.replace("2.5", "two"), r"metrics.csv, line 2 \(run a\): metric 'loss' is 'two'"),
        (RATIOS, METRICS.replace("loss", "acc::olmes"), "has the metric 'acc::olmes' twice"),
        (RATIOS.replace("run", "id"), METRICS, "no column names the run"),
        (RATIOS.replace("name", "run_id"), METRICS, "two columns name the run"),
        ("run,name,index\na,A,0\n", METRICS, "has no column for a domain"),
        ("run,web\n", METRICS, "has no runs below its header"),
        ("", METRICS, "no column names the run"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, ratios: str, metrics: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_table(*files(tmp_path, ratios, metrics))


def test_other_files_than_tables(tmp_path: Path) -> None:
    ratios, metrics = files(tmp_path)
    with pytest.raises(InputError, match=r"cannot read .*other.csv: No such file"):
        read_table(tmp_path / "other.csv", metrics)
    metrics.write_bytes(b"run,loss\n\xff\xfe,1\n")
    with pytest.raises(InputError, match="is not text"):
        read_table(ratios, metrics)


def test_runs_that_lack_something_are_dropped_where_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dropped run lacks is said. Values are needed only of the metrics that are read."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    paths = files(tmp_path, RATIOS + "d,D,3,1,0\n", METRICS.replace("3.5", "nan") + "e,E,3,1,1\n")
    table = read_table(*paths, missing="drop")
    assert table.runs == ("a", "c")
    assert set(table.dropped) == {"b", "d", "e"}
    assert table.values_RJ.tolist() == [[2.5, 0.1], [4.5, 0.3]]
    assert all(text in caplog.text for text in ("3 runs left out", "b (no loss)", "d (not in metrics.csv)"))
    assert read_table(*paths, missing="drop", drop=["loss"]).runs == ("a", "b", "c")
    assert read_table(*paths, missing="drop", only=["acc::olmes"]).metrics == ("acc::olmes",)
    with pytest.raises(InputError, match="have no run in common"):
        read_table(*files(tmp_path, RATIOS, "run,loss\nx,1\ny,2\n"), missing="drop")


def test_metrics_are_chosen_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    paths = files(tmp_path)
    with pytest.raises(InputError, match=r"no metric 'los'\. Did you mean 'loss'"):
        read_table(*paths, only=["los"])
    with pytest.raises(InputError, match=r"no metric of .* is left"):
        read_table(*paths, drop=["loss", "acc::olmes"])
    assert read_table(*paths, drop=["loss", "gone"]).metrics == ("acc::olmes",)
    assert "none of the metrics to drop: gone" in caplog.text


def test_what_is_written_is_read_back_the_same(tmp_path: Path) -> None:
    """Names with commas and quotes, and numbers to the last bit; a NaN is an empty field."""
    generator = np.random.default_rng(0)
    runs, domains, metrics = ["0000", 'a "b", c'], ["x,y", "z:1", "w"], ["m 1", "é"]
    ratios, values = generator.dirichlet(np.ones(3), size=2), generator.normal(size=(2, 2)) ** 9
    write_ratios(tmp_path / "r.csv", runs, domains, ratios)
    write_metrics(tmp_path / "m.csv", runs, metrics, values)
    table = read_table(tmp_path / "r.csv", tmp_path / "m.csv")
    assert (list(table.runs), list(table.domains), list(table.metrics)) == (runs, domains, metrics)
    assert np.array_equal(table.values_RJ, values)
    assert table.ratios_RK == pytest.approx(ratios, rel=1e-15)
    write_metrics(tmp_path / "m.csv", runs, metrics, np.array([[np.nan, 1.0], [2.0, 3.0]]))
    assert (tmp_path / "m.csv").read_text().splitlines()[1] == "0000,0000,0,,1.0"
