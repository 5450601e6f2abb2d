"""Runs of pytest without the start of an interpreter: each is a fork of one that has imported much.

    python warm.py

Standard input has one request on each line, in JSON: `folder`, `arguments`, `environment`, and
`output`, the file that receives what the run prints. The answer on a line of standard output is its
exit status. The process ends when standard input closes. Importing pytest, SQLAlchemy, FastAPI and
their like takes ten times as long as most of the runs that the tests of the plugin start.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

#: Imported in a run of pytest, so that pytest rewrites the assertions of plugins as it always does.
IMPORTS = """
import asyncpg, fastapi, httpx, sqlalchemy.dialects.postgresql.asyncpg, sqlalchemy.ext.asyncio
import pgtoolset.testing, pytest_pgtoolset._joined, pytest_pgtoolset._provisioning
import anyio.pytest_plugin, anyio._backends._asyncio, pytest_asyncio.plugin
from pgtoolset.testing.server import load_embedded

def test_imports():
    load_embedded()
"""


def warm_up() -> None:
    with tempfile.TemporaryDirectory() as folder:
        test = Path(folder) / "test_warm_up.py"
        test.write_text(IMPORTS)
        (Path(folder) / "pytest.ini").write_text("[pytest]")
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
        status = pytest.main([*options, "--rootdir", folder, str(test)])
        assert status == pytest.ExitCode.OK, status
    del sys.modules["test_warm_up"]


def run(request: dict[str, Any]) -> int:
    """Run pytest as `python -m pytest` does, in a process that is about to end."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["folder"]
    sys.argv[:] = ["pytest", *request["arguments"]]
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    return int(pytest.main())


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the warm-up prints is no answer
    warm_up()
    gc.freeze()  # pytest collects garbage at the end, again and again
    for line in sys.stdin:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            status = run(json.loads(line))
            sys.stdout.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    serve()
