"""The structure of the package: seven layers, no cycle at any level, nothing at the root but the command line."""

from __future__ import annotations

import graphlib
import tomllib
from collections import Counter, defaultdict

import grimp
import pytest
from commands import ROOT

PACKAGES = ["analysis", "core", "data", "engines", "interop", "mixing", "prepare", "studies", "training"]


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("megamix", cache_dir=None)


def test_nine_packages_and_no_other_module_at_the_root() -> None:
    root = ROOT / "megamix"
    assert sorted(path.parent.name for path in root.glob("*/__init__.py")) == PACKAGES
    assert sorted(path.name for path in root.glob("*.py")) == ["__init__.py", "__main__.py", "cli.py"]


def test_every_file_of_the_tests_has_a_name_of_its_own() -> None:
    """They are in no packages, so that pytest takes two of one name for the same, where it collects both."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert [name for name, number in Counter(names).items() if number > 1] in ([], ["conftest.py"])


def test_the_contracts_make_no_exception() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["name"] == "Lower layers never import higher ones")
    assert len(layers) == 7
    named = {part.strip().removeprefix("megamix.") for line in layers for part in line.split("|")}
    assert named == {*PACKAGES, "cli"}
    assert not any("ignore_imports" in each for each in contracts)


def test_the_children_of_every_package_import_each_other_in_no_circle(graph: grimp.ImportGraph) -> None:
    """A child is a module, or a package with all that is in it."""
    children: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            one, other = importer.split("."), imported.split(".")
            depth = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            if depth is not None:
                children[".".join(one[:depth])][one[depth]].add(other[depth])
    assert len(children["megamix"]["cli"]) > 3
    for package, imports in children.items():
        try:
            graphlib.TopologicalSorter(imports).prepare()
        except graphlib.CycleError as error:
            pytest.fail(f"{package}: {' -> '.join(error.args[1])}")
