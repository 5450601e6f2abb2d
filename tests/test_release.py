"""A release: its metadata, the workflows that test and publish it, and the check before it."""

from __future__ import annotations

import importlib.util
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"

#: It reads files of the source tree, and no version of another package changes them.
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not GITHUB.exists(), reason="reads files that no distribution has"),
]
if GITHUB.exists():
    spec = importlib.util.spec_from_file_location("release", GITHUB / "release.py")
    assert spec and spec.loader
    release = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(release)

WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def settings() -> dict[str, Any]:
    """What pyproject.toml says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pythons() -> set[str]:
    """The versions of Python that the classifiers name."""
    return {
        version
        for each in settings()["project"]["classifiers"]
        if re.fullmatch(r"3\.\d+", version := each.rpartition(" :: ")[2])
    }


def postgres() -> set[int]:
    """The versions of PostgreSQL that docs/compatibility.md has a row for."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    return {int(major) for major in re.findall(r"^\| PostgreSQL (\d+) \|", page, re.MULTILINE)}


def jobs(path: Path) -> dict[str, Any]:
    """The jobs of a workflow."""
    return dict(yaml.safe_load(path.read_text())["jobs"])


def matrix() -> list[dict[str, Any]]:
    """The rows of the test workflow."""
    return list(jobs(GITHUB / "workflows" / "tests.yml")["tests"]["strategy"]["matrix"]["include"])


@pytest.mark.parametrize("column", ["python", "postgres", "versions"])
@pytest.mark.parametrize("side", ["driver", "implementation"])
def test_matrix_covers_each_side(column: str, side: str) -> None:
    """Each Python, each PostgreSQL, and the oldest and newest versions meet each driver and each
    implementation."""
    expected: dict[str, set[Any]] = {
        "python": pythons(),
        "postgres": postgres(),
        "versions": {"oldest", "newest"},
        "driver": {"asyncpg", "psycopg"},
        "implementation": {"c", "python"},
    }
    assert expected[column]
    assert {(row[column], row[side]) for row in matrix()} == set(
        itertools.product(expected[column], expected[side])
    )


def test_matrix_covers_each_pair_of_sides() -> None:
    """Each driver meets each implementation."""
    assert {(row["driver"], row["implementation"]) for row in matrix()} == set(
        itertools.product(("asyncpg", "psycopg"), ("c", "python"))
    )


def test_matrix_names_the_servers() -> None:
    """A row runs on the embedded PostgreSQL, or on an image of the version that it names."""
    for row in matrix():
        embedded = row["postgres"] in (16, 18)
        assert row.get("image") == (None if embedded else f"postgres:{row['postgres']}")


def steps(path: Path) -> Iterator[tuple[str, str]]:
    """Each action of a workflow, with the comment behind it."""
    for line in path.read_text().splitlines():
        if found := re.fullmatch(r"\s*(?:- )?uses: (\S+)(?: # (.*))?", line):
            yield found[1], found[2] or ""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path: Path) -> None:
    """Each action of another project is named by the hash of a commit, its version behind it."""
    found = list(steps(path))
    assert found
    for action, version in found:
        if not action.startswith("./"):
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action)
            assert re.fullmatch(r"v\d+\.\d+\.\d+", version)


def test_actions_have_one_version() -> None:
    """The workflows use one version of each action, and a hash means one version."""
    pins = {
        (*action.split("@"), version)
        for path in WORKFLOWS
        for action, version in steps(path)
        if not action.startswith("./")
    }
    assert len({name for name, *_ in pins}) == len(pins)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_permissions(path: Path) -> None:
    """A workflow has no permission, a job reads the code, and only the job that publishes has an
    identity."""
    assert yaml.safe_load(path.read_text())["permissions"] == {}
    for name, job in jobs(path).items():
        if (path.name, name) == ("publish.yml", "publish"):
            assert job["permissions"] == {"id-token": "write", "attestations": "write"}
            assert job["environment"]["name"] == "pypi"
        else:
            assert job["permissions"] == {"contents": "read"}
        for step in job.get("steps", ()):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_publishing_waits_for_the_checks() -> None:
    """The files are published after the tag was compared and the files were checked."""
    needs = {name: job.get("needs") for name, job in jobs(GITHUB / "workflows/publish.yml").items()}
    assert needs == {"tag": None, "build": "tag", "check": "build", "publish": "check"}


def test_the_newest_section_is_the_version() -> None:
    """CHANGELOG.md begins with the section of the version in pyproject.toml."""
    heading = re.search(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading
    assert heading[1] == settings()["project"]["version"]
    assert re.fullmatch(r"unreleased|\d{4}-\d{2}-\d{2}", heading[2])


def test_addresses_are_of_one_repository() -> None:
    """The addresses in the metadata are those of one repository."""
    urls = settings()["project"]["urls"]
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} <= set(urls)
    assert not list(release.wrong_urls(urls, urls["Repository"]))


@pytest.mark.parametrize("url", ["https://github.com/else/pgtoolset", "https://github.com/a/bc/x"])
def test_another_repository(url: str) -> None:
    """An address of another repository is found, and one whose name only begins alike."""
    (wrong,) = release.wrong_urls({"Issues": url}, "https://github.com/a/b")
    assert wrong == f"project.urls.Issues in pyproject.toml is {url}: not in https://github.com/a/b"


@pytest.mark.parametrize("tag", ["v0.1", "0.1.0", "v0.1.0.dev1", "v0.1.1", ""])
def test_another_tag(tag: str) -> None:
    """A tag that is not `v` and the version is found."""
    (wrong,) = release.wrong_tag(tag, "0.1.0")
    assert "expected v0.1.0" in wrong
    assert not list(release.wrong_tag("v0.1.0", "0.1.0"))


@pytest.mark.parametrize(
    "text",
    [
        "# Changelog\n",
        "# Changelog\n\n## Unreleased\n\n## 0.1.0 (2026-01-02)\n",
        "# Changelog\n\n## 0.1.0 (unreleased)\n",
        "# Changelog\n\n## 0.1.1 (2026-01-02)\n",
        "# Changelog\n\n## 0x1y0 (2026-01-02)\n",
    ],
)
def test_a_changelog_without_the_release(text: str) -> None:
    """A changelog that does not begin with the dated section of the version is found."""
    (wrong,) = release.wrong_changelog(text, "0.1.0")
    assert "expected '## 0.1.0 (YYYY-MM-DD)'" in wrong
    assert not list(release.wrong_changelog("# C\n\n## 0.1.0 (2026-01-02)\n\n## 0.0.9", "0.1.0"))


def files() -> list[str]:
    """The names of the files that the wheel workflow builds."""
    version = settings()["project"]["version"]
    built = [
        f"{python.removesuffix('t')}-{python}-{platform}"
        for python in ("cp311", "cp312", "cp313", "cp314", "cp314t")
        for platform in (
            "manylinux2014_x86_64.manylinux_2_17_x86_64",
            "manylinux_2_28_aarch64",
            "musllinux_1_2_x86_64",
            "musllinux_1_2_aarch64",
            "macosx_10_15_x86_64",
            "macosx_11_0_arm64",
            "win_amd64",
        )
    ]
    wheels = [f"pgtoolset-{version}-{tags}.whl" for tags in ["py3-none-any", *built]]
    return [f"pgtoolset-{version}.tar.gz", *wheels]


def test_files_that_are_complete() -> None:
    """The files that the wheel workflow builds are complete."""
    assert not list(release.wrong_files(files(), settings()))


@pytest.mark.parametrize("missing", range(37))
def test_a_missing_file(missing: int) -> None:
    """A file that was not built is found, whichever it is."""
    names = files()
    assert len(names) == 37
    del names[missing]
    (wrong,) = release.wrong_files(names, settings())
    assert wrong.endswith("is missing")


@pytest.mark.parametrize(
    "name",
    ["build.log", "other-0.1.0.tar.gz", "pgtoolset-9.9.9.tar.gz", "pgtoolset-0.1.0.zip"],
)
def test_a_file_too_many(name: str) -> None:
    """A file of another version or package is found."""
    (wrong,) = release.wrong_files([*files(), name], settings())
    assert wrong.startswith(name)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The check exits with 1 and a line for each thing that is wrong, and otherwise with 0."""
    assert release.main([]) == 0
    assert capsys.readouterr().out == "nothing is wrong\n"
    assert release.main(["--tag", "v0", "--dist", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("the tag is v0, but pyproject.toml has version ")
    assert "the sdist is missing" in lines
