"""Check that a release is what it says: the tag, the changelog, the repository, the files.

The workflow that publishes runs it; by hand: `python .github/release.py --tag v1.2.3 --dist dist`.
It needs nothing but Python, and exits with 1 and one line for each thing that is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: `pgtoolset-1.2.3-cp311-cp311-macosx_11_0_arm64.whl`: what comes before the version, the version,
#: and the tags. The name of an sdist ends after the version.
WHEEL = re.compile(r"(?P<name>\w+)-(?P<version>[^-]+)-(?P<tags>[^-]+-[^-]+-[^-]+)\.whl")
SDIST = re.compile(r"(?P<name>\w+)-(?P<version>[^-]+)\.tar\.gz")

#: The platforms of .github/workflows/wheels.yml, as the tags of wheels name them.
PLATFORMS = (
    r"manylinux.*_x86_64",
    r"manylinux.*_aarch64",
    r"musllinux.*_x86_64",
    r"musllinux.*_aarch64",
    r"macosx_.*_x86_64",
    r"macosx_.*_arm64",
    r"win_amd64",
)


def wrong_tag(tag: str, version: str) -> Iterator[str]:
    """Find a tag that names another version than the package."""
    if tag != f"v{version}":
        yield f"the tag is {tag}, but pyproject.toml has version {version}: expected v{version}"


def wrong_changelog(text: str, version: str) -> Iterator[str]:
    """Find a changelog whose first section is not that of the version, with a date."""
    heading = next(iter(re.findall(r"^## .*$", text, re.MULTILINE)), "")
    if not re.fullmatch(rf"## {re.escape(version)} \(\d{{4}}-\d{{2}}-\d{{2}}\)", heading):
        yield (
            f"CHANGELOG.md begins with {heading!r}: expected '## {version} (YYYY-MM-DD)', the date "
            "of the release"
        )


def wrong_urls(urls: dict[str, str], repository: str) -> Iterator[str]:
    """Find addresses in the metadata that belong to another repository."""
    for name, url in urls.items():
        if url != repository and not url.startswith(f"{repository}/"):
            yield f"project.urls.{name} in pyproject.toml is {url}: not in {repository}"


def wrong_files(names: Iterable[str], settings: dict[str, Any]) -> Iterator[str]:
    """Find what is missing among the files to publish, and what does not belong there."""
    version = settings["project"]["version"]
    tags: list[str] = []
    for name in sorted(names):
        found = WHEEL.fullmatch(name) or SDIST.fullmatch(name)
        if not found or found["name"] != settings["project"]["name"]:
            yield f"{name} is neither an sdist nor a wheel of this package"
        elif found["version"] != version:
            yield f"{name} has version {found['version']}: expected {version}"
        else:
            tags.append(found.groupdict().get("tags", "sdist"))
    for tag, what in (("sdist", "sdist"), ("py3-none-any", "pure wheel")):
        if tag not in tags:
            yield f"the {what} is missing"
    for python in settings["tool"]["cibuildwheel"]["build"].split():
        abi = python.removesuffix("-*")
        for platform in PLATFORMS:
            if not any(
                re.fullmatch(rf"{abi.removesuffix('t')}-{abi}-{platform}", tag) for tag in tags
            ):
                yield f"a wheel for {abi} on {platform} is missing"


def main(arguments: list[str] | None = None) -> int:
    """Check what the arguments name and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="the tag that is released")
    parser.add_argument("--repository", help="the address of the repository")
    parser.add_argument("--dist", type=Path, help="the folder with the files to publish")
    given = parser.parse_args(arguments)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    wrong: list[str] = []
    if given.tag is not None:
        wrong += wrong_tag(given.tag, project["version"])
        wrong += wrong_changelog((ROOT / "CHANGELOG.md").read_text(), project["version"])
    if given.repository is not None:
        wrong += wrong_urls(project["urls"], given.repository)
    if given.dist is not None:
        wrong += wrong_files((each.name for each in given.dist.iterdir()), settings)
    print(*wrong or ["nothing is wrong"], sep="\n", file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
