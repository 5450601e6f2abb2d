"""The report: a page that has every measure, pictures that have the same bytes, clear errors."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks._declared import Benchmark, Curve, Experiment, Measure, at_most
from benchmarks._peers import LABELS
from benchmarks._run import Effort

from benchmarks import _page, _plots, _quoted, _results, _run, report

pytestmark = pytest.mark.once

BENCHMARKS = {name: _run.load(name) for name in report.MODULES}
RESULTS = _results.load(_results.COMMITTED)


def test_modules() -> None:
    """The report has every module of the folder that declares measures."""
    paths = Path(report.__file__).parent.glob("[a-z]*.py")
    declare = {path.stem for path in paths if "\nBENCHMARK = " in path.read_text()}
    assert declare == set(report.MODULES)


@pytest.mark.parametrize("name", report.MODULES)
def test_names(name: str) -> None:
    """The name of a measure is unique in its module."""
    names = [measure.name for measure in BENCHMARKS[name].measures]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9-]+", each) for each in names)


def test_names_of_pictures() -> None:
    """No curve overwrites the picture of another one, and each series has a style."""
    curves = [curve for benchmark in BENCHMARKS.values() for curve in benchmark.curves]
    assert len({curve.name for curve in curves}) == len(curves)
    assert all(len(curve.series) <= len(_plots.STYLES) for curve in curves)


@pytest.mark.parametrize("name", report.MODULES)
def test_committed(name: str) -> None:
    """Each measure and each curve of a module is in the committed results."""
    benchmark = BENCHMARKS[name]
    assert {each.name for each in benchmark.measures} <= set(RESULTS[name]["measures"])
    assert {each.name for each in benchmark.curves} <= set(RESULTS[name]["curves"])


def test_targets() -> None:
    """The committed results were judged by the targets that the modules declare."""
    for name, benchmark in BENCHMARKS.items():
        for measure in benchmark.measures:
            result = RESULTS[name]["measures"][measure.name]
            if measure.target is not None and "fails" not in result:
                assert result["target"] == str(measure.target), measure.name
                assert result["met"] is measure.target.is_met(result["median"]), measure.name


def test_page() -> None:
    """The committed page is the one that the committed results give."""
    assert _results.PAGE.read_text() == _page.render(BENCHMARKS, RESULTS)


@pytest.mark.parametrize("page", _quoted.QUOTED, ids=lambda page: page.name)
def test_quoted(page: Path) -> None:
    """The figures that other pages quote are those of the committed results."""
    found = _quoted.BETWEEN.findall(page.read_text())
    assert found == _quoted.tables(page, BENCHMARKS, RESULTS)


def test_complete() -> None:
    """The page names every measure, peer, module and picture; each picture is committed twice."""
    page = _results.PAGE.read_text()
    for name, benchmark in BENCHMARKS.items():
        assert f"python -m benchmarks.{name}`" in page
        assert all(f"| {measure.what} |" in page for measure in benchmark.measures)
        for curve in benchmark.curves:
            assert re.search(rf"!\[[^\]]{{30,}}\]\(images/bench/{curve.name}\.svg\)", page)
            for kind in ("svg", "png"):
                assert (_results.PICTURES / f"{curve.name}.{kind}").stat().st_size > 1000
    assert all(label in page for label in LABELS.values())


CURVE = Curve("c", "Title", "rows", "ms", (1, 10), {"a": "A", "b": "B"})
POINTS: dict[str, Any] = {
    "a": [
        {"size": 1, "median": 1.0, "low": 0.9, "high": 1.1, "n": 3},
        {"size": 10, "median": 10.0, "low": 9.0, "high": 12.0, "n": 3},
    ],
    "b": [{"size": 1, "fails": "Error: [x](y) | `z` <b>"}, {"size": 10, "fails": "Error: no"}],
}
ENVIRONMENT = {
    "date": "2026-01-01 00:00 UTC",
    "machine": "one, 2 cores, Linux",
    "load": "0.1 to 0.2",
    "seconds": 1,
    "versions": {"Python": "3.11"},
    "pgtoolset": "0.1.0",
}


def render(measures: dict[str, Any], curves: dict[str, Any]) -> str:
    measure = Measure("m", "what", "ours", "beside", "theirs", target=at_most(1))
    never_opened: Any = None
    experiment = Experiment("Experiment", never_opened, (measure,), (CURVE,))
    benchmark = Benchmark("Module", "About.", (experiment,))
    results = {"m": {"environment": ENVIRONMENT, "measures": measures, "curves": curves}}
    return _page.render({"m": benchmark}, results)


def test_failures_are_rows() -> None:
    """An error of a contestant is a row of the page, and no Markdown of ours."""
    page = render({"m": {"fails": "Error: <b>|", "contestant": "theirs"}}, {"c": POINTS})
    error = r"fails: Error: \<b\>\|"
    assert f"| what | beside | {error} |  |  | at most 1: not measured |" in page
    assert "| B | fails | fails |" in page
    assert "B fails: Error: no." in page


def test_missing_results_are_rows() -> None:
    """A measure, a curve or a module without a result is shown as not measured."""
    page = render({}, {})
    assert "| what | beside | not measured | | | at most 1 |" in page
    assert page.endswith("Not measured.\n")
    assert "Not measured." in _page.render(BENCHMARKS, {})


def test_missed_targets_come_first() -> None:
    """A target that is missed is shown above all tables, with its figure."""
    missed = {"median": 2.0, "low": 1.7, "high": 2.3, "n": 3, "met": False}
    missed |= {"least": 1.5, "most": 2.5}
    page = render({"m": missed}, {"c": POINTS})
    assert "Of 1 targets, 0 are met." in page
    assert "| what / beside | at most 1 | 2.00 (1.500 to 2.50) |" in page
    row = "| what | beside | 2.00 (1.500 to 2.50) | 1.700 to 2.30 | 3 | at most 1: **not met** |"
    assert row in page


def test_pictures(tmp_path: Path) -> None:
    """The same results give the same bytes, and an SVG that follows the reader's colours."""
    pytest.importorskip("matplotlib", reason='pip install "pgtoolset[bench]"')
    first = [path.read_bytes() for path in _plots.draw(CURVE, POINTS, tmp_path / "one")]
    second = [path.read_bytes() for path in _plots.draw(CURVE, POINTS, tmp_path / "two")]
    assert first == second
    svg = first[0].decode()
    assert "prefers-color-scheme: dark" in svg
    for light in _plots.SCHEME:
        assert svg.count(light) > 2, light
    assert "<dc:date>" not in svg
    assert "Title" in svg  # text stays text
    assert "B</text>" not in svg  # a series without a figure has no entry


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["nonsense"], {}, "no module 'nonsense'; there are sessions, units"),
        (["--nonsense"], {}, "unrecognized arguments: --nonsense"),
        (["units"], {"DRIVER": "psycopg"}, "the results are those of asyncpg; unset DRIVER"),
    ],
)
def test_bad_commands(
    arguments: list[str],
    environ: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bad command is one clear line and the exit code 2, before anything is measured."""
    monkeypatch.setenv("DRIVER", "asyncpg")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit:
        report.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", "an object of modules"), ('{"units": {}}', "units lacks one of")],
)
def test_broken_results(
    content: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file of results that cannot be read is one line with its name, and the exit code 2."""
    path = tmp_path / "results.json"
    path.write_text(content)
    monkeypatch.setattr(_results, "COMMITTED", path)
    monkeypatch.setattr(report, "parse", lambda arguments: None)
    assert report.main([]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: ") and message in line


def test_server_that_is_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that is away is one line without its password, and the exit code 2."""
    prepare(monkeypatch, tmp_path)
    monkeypatch.setenv("DATABASE_URL", "postgresql+asyncpg://me:secret@127.0.0.1:1/db")
    assert report.main(["units"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("no PostgreSQL to measure on: ")
    assert "secret" not in line


def test_module_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module that fails has its error in each row; what the others measured is written, and
    that at the end of each."""
    prepare(monkeypatch, tmp_path)
    written = []

    async def run(benchmark: Benchmark, *_: object, quick: bool) -> dict[str, Any]:
        written.append(_results.load(tmp_path / "results.json"))
        if benchmark is BENCHMARKS["locks"]:
            raise OSError("the disk is full")
        return RESULTS["imports"]

    monkeypatch.setattr(report, "load", BENCHMARKS.get)
    monkeypatch.setattr(report, "run_benchmark", run)
    assert report.main(["imports", "locks", "page", "--update"]) == 0
    assert [list(each) for each in written] == [[], ["imports"], ["imports", "locks"]]
    results = _results.load(tmp_path / "results.json")
    assert results["imports"] == RESULTS["imports"]
    fails = "OSError: the disk is full"
    assert set(results["locks"]["measures"]) == {each.name for each in BENCHMARKS["locks"].measures}
    assert all(each["fails"] == fails for each in results["locks"]["measures"].values())
    assert (tmp_path / "page.md").read_text().count(fails) > len(BENCHMARKS["locks"].measures)
    assert "locks fails: OSError: the disk is full" in capsys.readouterr().out


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have the command write into a folder, and measure as little as it can."""
    monkeypatch.setenv("DRIVER", "asyncpg")
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(report, "DRAFT", folder / "draft")
    monkeypatch.setattr(report, "QUICK", Effort(seconds=0, rounds=0, least=1, warm_up=0))
    monkeypatch.setattr(_plots, "draw", lambda *_: [])
    monkeypatch.setattr(_results, "COMMITTED", folder / "results.json")
    monkeypatch.setattr(_results, "PAGE", folder / "page.md")
    page = folder / "readme.md"
    monkeypatch.setattr(_quoted, "QUOTED", {page: ((("units", "settings"),),)})
    page.write_text("a\n<!-- figures -->\nold\n<!-- end of figures -->\nb\n")


def test_end_to_end(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run measures, writes a page, and fails where a target that was met is lost."""
    prepare(monkeypatch, tmp_path)
    monkeypatch.setenv("DATABASE_URL", database_url.replace("+psycopg", "+asyncpg"))
    [experiment, *_] = BENCHMARKS["units"].experiments

    def declare(*measures: Measure) -> None:
        declared = Benchmark("U", "u", (dataclasses.replace(experiment, measures=measures),))
        monkeypatch.setattr(report, "load", lambda name: declared)

    declare(*experiment.measures)
    report.main(["units", "--quick", "--update"])
    results = _results.load(tmp_path / "results.json")
    measures = results["units"]["measures"]
    assert set(measures) == {measure.name for measure in experiment.measures}
    assert "| `settings=` of two | `db_context()` | " in (tmp_path / "page.md").read_text()
    assert "old" not in (tmp_path / "readme.md").read_text()

    [control] = [each for each in experiment.measures if each.name == "control"]
    declare(dataclasses.replace(control, target=at_most(0.000_1)))
    measures["control"]["met"] = True
    _results.save(tmp_path / "results.json", results)
    capsys.readouterr()
    assert report.main(["units", "--quick"]) == 1
    told = capsys.readouterr()
    assert "not met any more: control control: db_context() / itself: target" in told.err
    assert (tmp_path / "draft" / "benchmarks.md").exists()
    assert _results.load(tmp_path / "results.json") == results


def test_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal, results stand above a bar, and their brackets stay."""
    with report.Terminal(["units"], 40.0) as terminal:
        terminal.begin(BENCHMARKS["units"].experiments[0], 40.0)
        terminal.round(1)
        terminal.line("a [bracket] stays")
    assert "a [bracket] stays" in capsys.readouterr().out
