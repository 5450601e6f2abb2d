"""What is built and installed: with a compiler, without one, without Cython, from the sdist."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = (
    *(
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "src",
        "stubs",
    ),
    *("Makefile", "requirements-minimum.txt", "requirements-release.txt"),
)
TESTED = ("tests", "docs", "examples", "benchmarks")
BUILT = {"associations_c", "comparator_c"}
LEFT_BY_TESTS = (
    "tests/__pycache__/test_build.pyc",
    "tests/native/.pytest_cache/v/cache/lastfailed",
)

#: What an editable install leaves in the source tree, and no checkout has.
IGNORED = shutil.ignore_patterns("__pycache__", ".pytest_cache", "*.egg-info", "*.so", "*.pyd")

#: The other half of `make check` runs where there is no source, on the wheel that was built from
#: it.
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="builds from the source tree"
)


def copied(folder: Path, *names: str) -> Path:
    """A copy of what is built, and of `names`, so that nothing is left in the source tree."""
    source = folder / "source"
    source.mkdir()
    for name in (*SOURCE, *names):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=IGNORED)
        else:
            shutil.copy(ROOT / name, source)
    return source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree, which the test may change."""
    return copied(tmp_path)


def run(
    folder: Path, *arguments: str, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this Python on `arguments`, there and with these variables of the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PGTOOLSET_")}
    kept["CFLAGS"] = "-O0"  # the speed of these modules is tested elsewhere
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=kept | dict(variables or {}),
        capture_output=True,
        text=True,
    )


def wheel_of(folder: Path, **variables: str) -> tuple[Path, str]:
    """The wheel that is built from a source tree, and what was printed meanwhile."""
    out = folder.parent / "wheel"
    result = run(
        folder,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        variables=variables,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    return wheel, result.stdout + result.stderr


def files_of(wheel: Path) -> dict[str, int]:
    """The files of the package in a wheel, and their checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            each.filename: each.CRC
            for each in archive.infolist()
            if each.filename.startswith("pgtoolset/")
        }


def installed(wheel: Path, **variables: str) -> str:
    """The value of `pgtoolset.implementation` in the package of this wheel."""
    target = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    program = "import pgtoolset; print(pgtoolset.__file__); print(pgtoolset.implementation)"
    result = run(
        wheel.parent,
        "-W",
        "error",
        "-c",
        program,
        variables={"PYTHONPATH": str(target), **variables},
    )
    assert result.returncode == 0, result.stderr
    file, implementation = result.stdout.split()
    assert Path(file).is_relative_to(target)
    return implementation


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built straight from the source tree, without compiled modules."""
    source = copied(tmp_path_factory.mktemp("pure"))
    wheel, _ = wheel_of(source, PGTOOLSET_NO_EXTENSIONS="1")
    return wheel


def required() -> dict[str, str]:
    """Variables of a build that must have compiled modules; a skip where no compiler is."""
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    if shutil.which(compiler.split()[0]) is None:
        pytest.skip(f"there is no C compiler {compiler}")
    return {"PGTOOLSET_REQUIRE_EXTENSIONS": "1"}


@dataclass
class Built:
    """An sdist with its tests, and the wheel that is built from it, with compiled modules."""

    source: Path
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both, from a tree in which tests have been run."""
    folder = tmp_path_factory.mktemp("built")
    source = copied(folder, *TESTED)
    for left in LEFT_BY_TESTS:
        (source / left).parent.mkdir(parents=True)
        (source / left).touch()
    out = folder / "dist"
    result = run(
        source,
        *("-m", "build", "--no-isolation", "--outdir", str(out)),
        variables=required(),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(source, sdist, wheel)


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """Variables of an environment in which there is no C compiler."""
    (tmp_path / "bin").mkdir()
    return {"CC": "no-such-compiler", "CXX": "no-such-compiler", "PATH": str(tmp_path / "bin")}


def test_wheel_with_compiled_modules(source: Path) -> None:
    """The wheel has each compiled module with its stub and no generated C; the source tree is
    unchanged."""
    before = {path for path in source.rglob("*") if path.is_relative_to(source / "src")}
    wheel, _ = wheel_of(source, **required())
    names = [name for name in files_of(wheel) if name.startswith("pgtoolset/_native/")]
    modules = {
        Path(name).name.partition(".")[0] for name in names if name.endswith((".so", ".pyd"))
    }
    assert modules == BUILT
    assert {Path(name).stem for name in names if name.endswith(".pyi")} == BUILT
    assert not [name for name in names if name.endswith((".c", ".cpp", ".h"))]
    after = {path for path in source.rglob("*") if path.is_relative_to(source / "src")}
    assert not [path for path in after - before if "egg-info" not in str(path)]
    assert installed(wheel) == "c"
    assert installed(wheel, PGTOOLSET_IMPL="python") == "python"


def test_sdist_builds_the_same_wheel(pure: Path, built: Built) -> None:
    """Nothing that the build needs is missing from the sdist."""
    ours, theirs = files_of(pure), files_of(built.wheel)
    assert ours.items() <= theirs.items()
    extra = {Path(name).name.partition(".")[0] for name in set(theirs) - set(ours)}
    assert extra == BUILT


def test_sdist_has_its_tests(built: Built) -> None:
    """The sdist can be tested: it has all of the tests and all files that they read."""
    wanted = {
        str(path.relative_to(built.source))
        for name in TESTED
        for path in (built.source / name).rglob("*")
        if path.is_file()
    }
    with tarfile.open(built.sdist) as archive:
        names = {
            member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()
        }
    assert {
        name for name in names if name.startswith(tuple(f"{folder}/" for folder in TESTED))
    } == wanted - set(LEFT_BY_TESTS)
    assert {"Makefile", "requirements-minimum.txt", "requirements-release.txt"} <= names


@pytest.mark.parametrize("package", ["pgtoolset", "pytest_pgtoolset"])
def test_packages_are_typed(pure: Path, built: Built, package: str) -> None:
    """Both packages say in the wheels and in the sdist that they are typed."""
    for wheel in (pure, built.wheel):
        with zipfile.ZipFile(wheel) as archive:
            assert f"{package}/py.typed" in archive.namelist()
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert f"src/{package}/py.typed" in names


def test_metadata(built: Built) -> None:
    """The wheel has the addresses, also of its authors, the licence and a description that an index
    can render."""
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    urls = dict(each.split(", ") for each in metadata.get_all("Project-URL", []))
    assert urls == project["urls"]
    (author,) = project["authors"]
    assert metadata["Author-email"] == f"{author['name']} <{author['email']}>"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert set(metadata.get_all("Classifier", [])) == set(project["classifiers"])


def test_no_compiler(source: Path, no_compiler: dict[str, str]) -> None:
    """Without a compiler there is a warning, and the package works without compiled modules."""
    wheel, output = wheel_of(source, **no_compiler)
    assert "no-such-compiler" in output
    assert 'building extension "pgtoolset._native.comparator_c" failed' in output
    assert not [name for name in files_of(wheel) if name.endswith((".so", ".pyd", ".pyi"))]
    assert installed(wheel) == "python"


def test_no_compiler_but_required(source: Path, no_compiler: dict[str, str]) -> None:
    """PGTOOLSET_REQUIRE_EXTENSIONS=1 makes a compiler that is missing an error."""
    result = run(
        source, "setup.py", "build", variables={**no_compiler, "PGTOOLSET_REQUIRE_EXTENSIONS": "1"}
    )
    assert result.returncode != 0
    assert "no-such-compiler" in result.stderr


def test_no_cython(source: Path, tmp_path: Path) -> None:
    """Without Cython there is a warning and a pure wheel, or an error where C is required."""
    hidden = tmp_path / "hidden" / "Cython"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError(__name__)")
    variables = {"PYTHONPATH": str(hidden.parent)}
    result = run(source, "setup.py", "build", variables=variables)
    assert result.returncode == 0, result.stderr
    assert "without Cython, pgtoolset is built without its compiled modules" in result.stderr
    assert not [*source.rglob("*.so"), *source.rglob("*.pyd")]
    result = run(
        source, "setup.py", "build", variables={**variables, "PGTOOLSET_REQUIRE_EXTENSIONS": "1"}
    )
    assert result.returncode == 1
    assert "PGTOOLSET_REQUIRE_EXTENSIONS is set, but Cython is not installed" in result.stderr


def test_no_extensions_wanted(pure: Path) -> None:
    """PGTOOLSET_NO_EXTENSIONS=1 makes a pure wheel, for every platform."""
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in files_of(pure) if name.endswith((".so", ".pyd", ".pyi"))]
    assert installed(pure) == "python"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"PGTOOLSET_NO_EXTENSIONS": "1", "PGTOOLSET_REQUIRE_EXTENSIONS": "1"},
            "exclude one another",
        ),
        ({"PGTOOLSET_NO_EXTENSIONS": "yes"}, "PGTOOLSET_NO_EXTENSIONS must be 1 or 0, not 'yes'"),
    ],
)
def test_contradictions(source: Path, variables: dict[str, str], message: str) -> None:
    """Contradictory and unknown values of the variables are errors that say so."""
    result = run(source, "setup.py", "--version", variables=variables)
    assert result.returncode == 1
    assert message in result.stderr


def test_wheels_for_each_python() -> None:
    """Wheels are built for every supported Python, and for the last one without a GIL too."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    name = "Programming Language :: Python :: 3."
    minors = [
        int(each.removeprefix(name))
        for each in settings["project"]["classifiers"]
        if each.startswith(name)
    ]
    assert minors == [*range(minors[0], minors[-1] + 1)]
    assert settings["project"]["requires-python"] == f">=3.{minors[0]}"
    wheels = [f"cp3{minor}-*" for minor in minors]
    assert settings["tool"]["cibuildwheel"]["build"].split() == [*wheels, f"cp3{minors[-1]}t-*"]
