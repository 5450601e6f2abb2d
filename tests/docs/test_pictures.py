"""The drawings of the pages: there, readable in light and dark, and described in words."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

#: The same on every version.
pytestmark = pytest.mark.once

DOCS = Path(__file__).parents[2] / "docs"
#: The drawings, which are made by hand; plots and photographs of a page have makers of their own.
PICTURES = sorted((DOCS / "images").glob("*.svg"))
SHOWN = [
    (page.name, *found)
    for page in sorted(DOCS.glob("*.md"))
    for found in re.findall(r"!\[([^\]]*)\]\((images/[^)]+)\)", page.read_text())
]

SVG = "{http://www.w3.org/2000/svg}"
CLASS = re.compile(r"^ *([\w. -]+) \{ (.*) \}$", re.MULTILINE)


def test_shown() -> None:
    """Each drawing is on a page, each picture that is shown is there, with a text in its place."""
    assert len(PICTURES) > 2
    assert {shown for _, _, shown in SHOWN} >= {f"images/{each.name}" for each in PICTURES}
    assert [shown for _, _, shown in SHOWN if not (DOCS / shown).is_file()] == []
    assert [shown for _, text, shown in SHOWN if len(text.split()) < 4] == []


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_described(picture: Path) -> None:
    """It is an SVG with a title and a description, which a screen reader is led to."""
    root = ElementTree.parse(picture).getroot()
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    first, second = (root.find(f"{SVG}{name}") for name in ("title", "desc"))
    assert first is not None and second is not None
    assert root.get("aria-labelledby") == f"{first.get('id')} {second.get('id')}"
    assert first.text and len((second.text or "").split()) > 30


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_light_and_dark(picture: Path) -> None:
    """Each class that has a colour has another one in the dark, no colour stands elsewhere, and
    nothing is fetched."""
    text = picture.read_text()
    light, query, dark = text.partition("@media (prefers-color-scheme: dark)")
    assert query
    coloured = {name for name, rules in CLASS.findall(light) if "#" in rules}
    assert coloured == {name for name, rules in CLASS.findall(dark) if "#" in rules} != set()
    assert not re.search(r"(fill|stroke|style)=", text)
    assert set(re.findall(r"(?:url\(|href=\"?)([^)\"]+)", text)) <= {"#arrow", "#badarrow"}
    used = {name for names in re.findall(r'class="([^"]*)"', text) for name in names.split()}
    assert used <= {name.removeprefix(".") for name, _ in CLASS.findall(light)}


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_contrast(picture: Path) -> None:
    """Text stands out from each area that it may be on, in light and dark (WCAG: 4.5 to 1)."""
    for scheme in picture.read_text().split("@media (prefers-color-scheme: dark)"):
        rules = dict(CLASS.findall(scheme))
        (ink,) = re.findall(r"fill: (#\w{6})", rules["text"])
        for area in (".paper", ".box", ".inner", ".good", ".bad"):
            (paper,) = re.findall(r"fill: (#\w{6})", rules[area])
            assert contrast(ink, paper) >= 4.5, area


def contrast(one: str, other: str) -> float:
    """The ratio of the luminance of two colours, as WCAG 2 defines it."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
