"""The wheel and the editable install: what is in them, and that they work from anywhere beside Hugging Face's
``kernels``."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import megamix
from megamix.cli import app
from megamix.core.packages import MODULES

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "deepspeed", "transformers", "matplotlib"}
# Where the name of the package to install is not that of the module; pydantic brings its own pydantic_core.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "google": "protobuf",
    "megatron": "megatron-core",
    "sklearn": "scikit-learn",
    "markdown_it": "markdown-it-py",
    "pydantic_core": "pydantic",
}

# transformers looks for a distribution of this name, of a version it likes, and imports names from it; these decorators
# change nothing.
FAKE_KERNELS = """\
MARKER = "Hugging Face's"
USED = []
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def decorator(*arguments, **options):
        USED.append(name)
        return lambda decorated: decorated
    return decorator
"""
BUILD_LLAMA = """\
import megamix_kernels, transformers
from transformers.utils.import_utils import is_kernels_available
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)
transformers.LlamaForCausalLM(config)
print("kernels available:", is_kernels_available(), "megamix_kernels:", megamix_kernels.__file__)
"""
CHECK_MARKER = """
import kernels
assert kernels.MARKER == "Hugging Face's" and kernels.USED, kernels
"""


def execute(*arguments: str | Path, cwd: Path, path: list[Path] | None = None) -> str:
    """Runs a command with nothing on PYTHONPATH but ``path``; returns what it prints."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    if path:
        environ["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, cwd: Path, path: list[Path]) -> str:
    return execute(sys.executable, "-c", code, cwd=cwd, path=path)


def pip(*arguments: str | Path, cwd: Path) -> None:
    """pip without the network: it builds with the setuptools that is installed."""
    execute(sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-build-isolation", cwd=cwd)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files that a clone would have, relative to the checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = execute("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def clone(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, so that nothing else can slip in and builds leave nothing in the checkout."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--wheel-dir", folder, clone, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package that transformers takes for Hugging Face's ``kernels``."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    folder = tmp_path_factory.mktemp("hugging_face")
    info = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    for made in (folder / "kernels", info):
        made.mkdir()
    (folder / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return folder


# What is in the wheel


def test_the_wheel_holds_packages_configs_and_job_scripts_and_nothing_else(wheel: Path, tracked: list[str]) -> None:
    """Every tracked file of both packages, every YAML of configs/ and every job script of slurm/ (inside megamix); no
    tests, and no top-level package called kernels, configs or slurm, which would overwrite another's."""
    moved = {
        "kernels/megamix_kernels/": ("megamix_kernels/", ""),
        "configs/": ("megamix/configs/", ".yaml"),
        "slurm/": ("megamix/slurm/", (".sbatch", ".sh")),
        "megamix/": ("megamix/", (".py", ".typed", ".css", ".js")),
    }
    expected = {
        new + name.removeprefix(old)
        for name in tracked
        for old, (new, ends) in moved.items()
        if name.startswith(old) and name.endswith(ends)
    }
    assert {"megamix/cli.py", "megamix/configs/demo.yaml", "megamix/configs/models/neox-2m.yaml"} < expected
    assert "megamix/slurm/train.sbatch" in expected
    assert {"megamix_kernels/__init__.py", "megamix/prepare/corpus/build.py"} < expected
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"megamix-{megamix.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == expected
    assert {name.split("/")[0] for name in names} == {"megamix", "megamix_kernels", info.rstrip("/")}
    assert f"{info}licenses/LICENSE" in names


def requirements(wheel: Path) -> dict[str, set[str]]:
    """Distribution name -> the extras that ask for it ('' for always), from the wheel's metadata."""
    found: dict[str, set[str]] = {}
    for line in zipfile.ZipFile(wheel).read(f"megamix-{megamix.__version__}.dist-info/METADATA").decode().splitlines():
        if match := re.match(r"Requires-Dist: ([\w.-]+)(?:.*extra == \W(\w+))?", line):
            found.setdefault(match[1].lower(), set()).add(match[2] or "")
    return found


def imported(folder: Path) -> set[str]:
    """The distributions that the files of a folder import, by name, the standard library and our own left out."""
    modules: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(str(node.module).split(".")[0])
    ours = {"megamix", "megamix_kernels", "tests", *(file.stem for file in folder.rglob("*.py"))}
    return {DISTRIBUTIONS.get(module, module) for module in modules - ours - sys.stdlib_module_names}


def test_everything_imported_is_required(wheel: Path, clone: Path) -> None:
    """What the packages import is required, or in an extra; what the tests import is required, or in all or dev."""
    required = requirements(wheel)
    used = imported(clone / "megamix") | imported(clone / "kernels" / "megamix_kernels")
    assert {"torch", "numpy", "pyyaml", "pydantic"} <= used
    assert used - required.keys() == set()
    assert {name for name in used if required[name] == {"dev"}} == set()
    assert {name for name in imported(clone / "tests") if not required.get(name, set()) & {"", "all", "dev"}} == set()
    assert {name for name in used if required[name] == {"bench"}} == set()
    assert {extra for extras in required.values() for extra in extras} >= {"", "all", "dev", "cuda", "megatron"}


def test_a_light_core(wheel: Path) -> None:
    """No tensors, engines, tokenizers or plots without being asked for, and each module of an extra where the messages
    say it is."""
    required = requirements(wheel)
    assert {name for name, extras in required.items() if "" in extras} == {
        *("numpy", "pydantic", "pyyaml", "rich", "scipy", "typer"),
    }
    for extra, modules in MODULES.items():
        for module in modules:
            assert extra in required[DISTRIBUTIONS.get(module, module)], f"{module} of {extra}"
    in_all = {extra for extra in MODULES if all("all" in required[DISTRIBUTIONS.get(m, m)] for m in MODULES[extra])}
    assert in_all == MODULES.keys() - {"datasets", "sentencepiece", "wandb"}


def test_the_lock_has_every_requirement_in_a_version_that_setup_py_allows(wheel: Path, clone: Path) -> None:
    """All but PyTorch, whose build differs from machine to machine; and no package twice."""
    lines = zipfile.ZipFile(wheel).read(f"megamix-{megamix.__version__}.dist-info/METADATA").decode().splitlines()
    wanted = [Requirement(line.partition(":")[2]) for line in lines if line.startswith("Requires-Dist:")]
    locked = [Requirement(line) for line in (clone / "constraints.txt").read_text().splitlines()]
    versions = {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in locked}
    assert len(versions) == len(locked)
    environments = ({"extra": ""}, {"extra": "all"}, {"extra": "dev"})
    needed = [each for each in wanted if each.marker is None or any(map(each.marker.evaluate, environments))]
    assert len(needed) > 20
    for each in needed:
        if each.name != "torch":
            assert each.specifier.contains(versions[canonicalize_name(each.name)]), each


def test_the_console_script(wheel: Path, site: Path, tmp_path: Path) -> None:
    entry = zipfile.ZipFile(wheel).read(f"megamix-{megamix.__version__}.dist-info/entry_points.txt").decode()
    assert entry.split() == ["[console_scripts]", "megamix", "=", "megamix.cli:main"]
    assert "Usage: megamix" in execute(site / "bin" / "megamix", "--help", cwd=tmp_path, path=[site])


# The wheel at work, from elsewhere


def test_the_installed_package_works_from_elsewhere(site: Path, tmp_path: Path) -> None:
    """The command, the presets and the kernels, all from the installed files."""
    usage = execute(sys.executable, "-m", "megamix", "--help", cwd=tmp_path, path=[site])
    assert "Usage: " in usage
    assert "prepare" in usage
    code = (
        "import megamix, megamix_kernels\n"
        "from megamix.engines.models.config import preset\n"
        "from megamix.core.files import shipped_folder\n"
        "print(preset('neox-2m')['hidden_size'], megamix.__file__, megamix_kernels.__file__, shipped_folder('configs'))"
    )
    size, *files = python(code, tmp_path, [site]).split()
    assert size == "192"
    assert files == [
        str(site / "megamix/__init__.py"),
        str(site / "megamix_kernels/__init__.py"),
        str(site / "megamix/configs"),
    ]


def test_installed_beside_hugging_face_s_kernels(site: Path, hugging_face: Path, tmp_path: Path) -> None:
    """Both import, ours first on the path, and transformers builds a Llama with what it takes from the other."""
    printed = python(BUILD_LLAMA + CHECK_MARKER, tmp_path, [site, hugging_face])
    assert f"kernels available: True megamix_kernels: {site}" in printed


@pytest.mark.slow
def test_installed_without_hugging_face_s_kernels(site: Path, tmp_path: Path) -> None:
    assert f"megamix_kernels: {site}" in python(BUILD_LLAMA, tmp_path, [site])


# The checkout


def test_the_folder_kernels_is_no_package(tracked: list[str]) -> None:
    assert "kernels/megamix_kernels/__init__.py" in tracked
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "configs" / "__init__.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("present", [True, False], ids=["with kernels", "without kernels"])
def test_checkout_and_hugging_face_s_kernels(present: bool, hugging_face: Path) -> None:
    """From the checkout's root, where a folder called kernels lies in the way."""
    path = [ROOT, ROOT / "kernels", *([hugging_face] if present else [])]
    printed = python(BUILD_LLAMA + (CHECK_MARKER if present else ""), ROOT, path)
    assert f"megamix_kernels: {ROOT / 'kernels'}" in printed
    assert not present or "kernels available: True" in printed


def test_editable_install_works_from_elsewhere(clone: Path, hugging_face: Path, tmp_path: Path) -> None:
    """pip install -e: the files of the checkout are used, what is added shows at once, ``kernels`` is left alone."""
    folder = tmp_path / "editable"
    pip("install", "--target", folder, "--editable", clone, cwd=tmp_path)
    # The Python that runs the tests may hold an editable install of its own, which would answer first.
    begin = (
        "import site, sys\n"
        "for name in [name for name in sys.modules if name.startswith('__editable__')]: del sys.modules[name]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        f"sys.path.insert(0, {str(folder)!r}); site.addsitedir({str(folder)!r})\n"
    )
    code = begin + (
        "import megamix, megamix_kernels, kernels\n"
        "from megamix.engines.models.config import preset\n"
        "print(preset('neox-2m')['hidden_size'], megamix.__file__, megamix_kernels.__file__, kernels.MARKER)"
    )
    size, ours, theirs, *marker = python(code, tmp_path, [hugging_face]).split()
    assert size == "192"
    assert ours == str(clone / "megamix/__init__.py")
    assert theirs == str(clone / "kernels/megamix_kernels/__init__.py")
    assert " ".join(marker) == "Hugging Face's"
    new = clone / "configs" / "models" / "neox-new.yaml"
    new.write_text("architecture: neox\n")
    try:
        code = begin + "from megamix.engines.models.config import preset; print(preset('neox-new'))"
        assert python(code, tmp_path, [hugging_face]).strip() == "{'architecture': 'neox'}"
    finally:
        new.unlink()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--help-config"]], ids=" ".join)
def test_help_is_light(arguments: list[str]) -> None:
    """No help imports torch or anything as slow."""
    code = (
        "import sys\nfrom megamix.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        f"print('\\nloaded:', sorted({HEAVY!r} & set(sys.modules)))"
    )
    printed = python(code, ROOT, [ROOT, ROOT / "kernels"])
    assert printed.splitlines()[-1] == "loaded: []"
    assert len(printed.splitlines()) > 5


@pytest.mark.parametrize("group", [[], ["swarm"], ["blend"]], ids=" ".join)
def test_every_command_is_listed_with_its_whole_first_sentence(group: list[str]) -> None:
    from typer.main import get_command

    listing = get_command(app)
    for name in group:
        listing = listing.commands[name]
    printed = " ".join(CliRunner().invoke(app, [*group, "-h"]).output.split())
    assert listing.commands
    for name, command in listing.commands.items():
        sentence = " ".join(command.help.split()).split(". ")[0].removesuffix(".")
        assert printed.count(f"{name} {sentence}.") == 1


def test_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"megamix {megamix.__version__}\n"


# What else is built


def test_the_source_distribution_holds_what_the_wheel_is_made_of(wheel: Path, clone: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    name = execute(sys.executable, "-c", code, cwd=clone).split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        (root,) = {member.split("/")[0] for member in archive.getnames()}
        held = {member.removeprefix(f"{root}/") for member in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "slurm/common.sh"} <= held
    places = {
        "megamix/configs/": "configs/",
        "megamix/slurm/": "slurm/",
        "megamix_kernels/": "kernels/megamix_kernels/",
    }
    for file in zipfile.ZipFile(wheel).namelist():
        place = next((new + file.removeprefix(old) for old, new in places.items() if file.startswith(old)), file)
        assert place in held or ".dist-info/" in file, file


def test_both_images_are_of_the_versions_that_make_installs(clone: Path) -> None:
    """And copy what is there: a build needs a network and an hour, so only this is checked."""
    image, apptainer = (clone / "Containerfile").read_text(), (clone / "slurm" / "megamix.def").read_text()
    (torch,) = re.findall(r"^TORCH \?= (\S+)$", (clone / "Makefile").read_text(), re.M)
    assert f'ARG TORCH="{torch}"' in image
    assert f"constraints.txt {torch}\n" in apptainer
    (base,) = re.findall(r"^ARG BASE=docker\.io/(\S+)$", image, re.M)
    assert f"\nFrom: {base}\n" in apptainer
    copied = {name for line in re.findall(r"^COPY (.+) /src/\S*$", image, re.M) for name in line.split()}
    assert copied == set(re.findall(r"^    (\S+) /src/\S+$", apptainer, re.M))
    assert {"setup.py", "README.md", "LICENSE", "constraints.txt"} < copied
    assert [name for name in copied if not (clone / name).exists()] == []
