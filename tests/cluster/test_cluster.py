"""The proof on a Patroni cluster, in its short form, and how it starts and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from examples.cluster.__main__ import parse
from examples.cluster.keeper import programs_of
from examples.cluster.programs import MissingProgram, find_programs

#: Patroni is in one of the two environments of `make check`.
pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "examples.cluster"]


def missing() -> str:
    try:
        find_programs()
    except MissingProgram as error:
        return str(error)
    return ""


MISSING = missing()

needs_cluster = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def started(*options: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *options],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def temporary() -> Iterator[Path]:
    """Yield a directory for temporary files that the servers' user can reach."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)
        yield Path(directory)


@needs_cluster
def test_truth_through_failovers() -> None:
    """Through cuts, a switchover, a kill and a freeze of the primary nothing that the application
    was told is false, by a URL of several hosts, HAProxy and PgBouncer; nothing is left behind."""
    with temporary() as directory:
        # How fast a machine that runs other tests goes on is no property of the library.
        process = started("--once", "--resume", "60", TMPDIR=str(directory))
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert "Everything holds" in output
        assert programs_of(str(directory)) == []
        assert list(directory.iterdir()) == []


@needs_cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind(number: signal.Signals) -> None:
    """A run that is interrupted or killed ends all that it has started, and PostgreSQL, which
    Patroni has started away from itself, too."""
    with temporary() as directory:
        process = started("--once", TMPDIR=str(directory))
        while not any(directory.glob("*/node*/data/postmaster.pid")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGKILL else 130), output
        # The keeper of a killed run has its own time.
        end = time.monotonic() + 30
        while any(directory.iterdir()) and time.monotonic() < end:
            time.sleep(0.1)
        assert list(directory.iterdir()) == []
        assert programs_of(str(directory)) == []


@pytest.mark.parametrize("name", ["etcd", "haproxy", "pgbouncer"])
def test_program_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is missing is one line that says which, and how it is installed."""
    which = "examples.cluster.programs.shutil.which"
    monkeypatch.setattr(which, lambda each, path=None: None if each == name else f"/bin/{each}")
    with pytest.raises(MissingProgram) as caught:
        find_programs()
    assert str(caught.value).startswith(f"{name} is not installed: apt-get install")
    assert "\n" not in str(caught.value)


def test_patroni_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patroni that is missing is one line that names the extra."""
    monkeypatch.setattr("examples.cluster.programs.shutil.which", lambda each, path=None: each)
    monkeypatch.setattr("examples.cluster.programs.importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingProgram, match=r'^patroni is not installed: pip install "pgtoolset'):
        find_programs()


def test_exit_code_of_a_missing_program() -> None:
    """Without its programs the proof ends with 2 and one line."""
    block = "import shutil, sys; shutil.which = lambda *a, **k: None; sys.argv = ['cluster']; "
    start = "from examples.cluster.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", block + start], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("The cluster cannot start. etcd is not installed")
    assert len(done.stderr.splitlines()) == 1


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options come from the command line and from the environment, and bad ones are refused."""
    for name in ("CLUSTER_SECONDS", "CLUSTER_ONCE", "CLUSTER_DRIVER"):
        monkeypatch.delenv(name, raising=False)
    assert (parse([]).seconds, parse([]).driver, parse(["--strict"]).strict) == (
        180,
        "asyncpg",
        True,
    )
    assert (parse([]).resume, parse(["--driver=psycopg"]).resume, parse(["--resume=1"]).resume) == (
        2.0,
        4.0,
        1.0,
    )
    monkeypatch.setenv("CLUSTER_ONCE", "1")
    monkeypatch.setenv("CLUSTER_DRIVER", "psycopg")
    assert (parse([]).seconds, parse([]).driver) == (0, "psycopg")
    for bad in ("--seconds=0", "--seconds=soon", "--driver=other", "--resume=-1"):
        with pytest.raises(SystemExit) as caught:
            parse([bad])
        assert caught.value.code == 2
    monkeypatch.setenv("CLUSTER_SECONDS", "nan")
    with pytest.raises(SystemExit):
        parse([])
