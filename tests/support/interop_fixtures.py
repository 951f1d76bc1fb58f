"""The data and the run of the tests of exported blends; a plugin of each of their files."""

from __future__ import annotations

from pathlib import Path

import pytest
from interop_files import Line, changing_run, write_data

from megamix.data.blend.blend import Blend


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def run(data: Path) -> tuple[Path, list[Line], Blend]:
    return changing_run(data)
