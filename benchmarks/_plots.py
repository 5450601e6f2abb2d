"""Pictures of curves, as SVG for the site and as PNG for pages that show no SVG.

Matplotlib draws them; `pip install "pgtoolset[bench]"` brings it. The same results give the same
bytes: no date, no random ids. An SVG has a background of its own and follows the reader's colour
scheme, so that it can be read on a page of either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._declared import Curve

#: Background, text, and lines of the grid: in light, in dark.
SCHEME = {"#ffffff": "#16191d", "#24292f": "#e6e9ed", "#d5d9de": "#3b4148"}
BACKGROUND, INK, GRID = SCHEME

#: Okabe and Ito's colours that stand out from both backgrounds, each with a mark of its own.
STYLES = (
    ("#0072b2", "o", "-"),
    ("#d55e00", "s", "--"),
    ("#009e73", "^", "-."),
    ("#cc79a7", "D", ":"),
)

#: Presentation attributes and inline styles alike yield to an important rule of a stylesheet.
RULES = "".join(
    f'[style*="fill: {light}"]{{fill:{dark} !important}}'
    f'[style*="stroke: {light}"]{{stroke:{dark} !important}}'
    for light, dark in SCHEME.items()
)
STYLE = f"<style>@media (prefers-color-scheme: dark){{{RULES}}}</style>"

SETTINGS = {
    "svg.hashsalt": "pgtoolset",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": BACKGROUND,
    "figure.facecolor": BACKGROUND,
    "savefig.facecolor": BACKGROUND,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.edgecolor": GRID,
    "legend.facecolor": BACKGROUND,
}


def draw(curve: Curve, points: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a curve into a folder, as `NAME.svg` and `NAME.png`, and return these paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{curve.name}.{kind}" for kind in ("svg", "png")]
    with matplotlib.rc_context(SETTINGS):
        figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
        for (contestant, label), style in zip(curve.series.items(), STYLES, strict=False):
            plot(axes, label, points.get(contestant, []), style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(ticker.FixedLocator(curve.sizes))
        low, high = axes.get_ylim()
        if high / low < 100:
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel(curve.x)
        axes.set_ylabel(curve.y)
        axes.set_title(curve.title, loc="left")
        axes.grid(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(paths[0], metadata={"Date": None, "Creator": None})
        figure.savefig(paths[1], dpi=150, metadata={"Software": None})
        pyplot.close(figure)
    text = paths[0].read_text(encoding="utf-8")
    head, tag, rest = text.partition("<defs>")
    lines = (line.rstrip() for line in f"{head}{STYLE}{tag}{rest}".splitlines())
    paths[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def plot(axes: Any, label: str, points: list[dict[str, Any]], style: tuple[str, str, str]) -> None:
    """Draw one series: the medians, and a band between the quartiles."""
    colour, marker, line = style
    measured = [point for point in points if "fails" not in point]
    if not measured:
        return
    sizes, medians, low, high = (
        [point[key] for point in measured] for key in ("size", "median", "low", "high")
    )
    axes.plot(sizes, medians, color=colour, marker=marker, linestyle=line, label=label)
    axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
