"""The notebook that goes from the files of a run to its story."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import ROOT
from recorded_runs import NAMES, write_data, write_run

NOTEBOOK = ROOT / "megamix" / "analysis" / "story.ipynb"


def test_its_cells_tell_the_story_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    manifest = write_data(tmp_path / "data")
    write_run(tmp_path / "run", manifest.folder)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)
    names: dict[str, object] = {}
    for cell in cells:
        code = "".join(cell["source"])
        exec(code.replace('Path("runs/demo")', f"Path({str(tmp_path / 'run')!r})"), names)
    said = capsys.readouterr().out
    assert "fell most: c_$1$ by 4.000; least: _books by 0.500" in said
    story = names["story"]
    assert set(story.index) == set(NAMES)  # pyright: ignore[reportAttributeAccessIssue]
    last = json.loads((tmp_path / "run" / "weights.jsonl").read_text().splitlines()[-1])
    found = story["last weight"].to_dict()  # pyright: ignore[reportIndexIssue]
    assert found == dict(zip(NAMES, last["domain_weights"], strict=True))
