"""An index for pip that serves the packages which are installed here: nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: What a wheel is built from.
SOURCE = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "src")


def wheel_name(installed: importlib.metadata.Distribution) -> str:
    """The file name of the wheel that a distribution was installed from."""
    tag = re.search(r"^Tag: (\S+)$", installed.read_text("WHEEL") or "", re.MULTILINE)
    assert tag is not None, installed.name
    return f"{installed.name.replace('-', '_')}-{installed.version}-{tag[1]}.whl"


def is_editable(installed: importlib.metadata.Distribution) -> bool:
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def link(installed: importlib.metadata.Distribution, folder: Path) -> Path:
    """Write a wheel of a distribution whose metadata are its own and whose code is a link.

    So pip resolves, installs and makes programs as ever, and a package that the page forgets is
    missing; but no file is copied and compiled again, which would take most of the time.
    """
    wheel = folder / wheel_name(installed)
    code = folder / f"code of {installed.name}"
    code.mkdir()
    files = [file for file in installed.files or () if ".." not in file.parts]
    for top in {file.parts[0] for file in files}:
        if not top.endswith((".dist-info", ".pth", "__pycache__")):
            (code / top).symlink_to(str(installed.locate_file(top)))
    about = next(file.parts[0] for file in files if file.parts[0].endswith(".dist-info"))
    content = {f"{installed.name}.pth": f"{code}\n"}
    for name in ("METADATA", "WHEEL", "entry_points.txt"):
        if text := installed.read_text(name):
            content[f"{about}/{name}"] = text
    content[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in [*content, f"{about}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return wheel


def build(folder: Path) -> Path:
    """Build the wheel of the source tree, without its compiled modules, in a copy."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCE:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "*.c")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    command = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=source,
        env={**os.environ, "PGTOOLSET_NO_EXTENSIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.split()[-1]


class _Index(BaseHTTPRequestHandler):
    """`/simple/NAME/` links to one wheel, which is made when it is asked for."""

    server: _Server

    def do_GET(self) -> None:
        _, kind, name, *_ = self.path.split("/")
        try:
            wheel = self.server.wheel_of(name)
        except importlib.metadata.PackageNotFoundError:
            self.send_error(404)
            return
        body = (
            f'<!doctype html><a href="/wheel/{name}/{wheel.name}">{wheel.name}</a>'.encode()
            if kind == "simple"
            else wheel.read_bytes()
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if kind == "simple" else "application/zip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


class _Server(ThreadingHTTPServer):
    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Index)
        self.folder = folder
        self._wheels: dict[str, Path] = {}
        self._lock = threading.Lock()

    def wheel_of(self, name: str) -> Path:
        with self._lock:
            if name not in self._wheels:
                installed = importlib.metadata.distribution(name)
                make = build if is_editable(installed) else partial(link, installed)
                self._wheels[name] = make(self.folder)
            return self._wheels[name]


@contextmanager
def package_index(folder: Path) -> Iterator[str]:
    """Serve what is installed here, and pgtoolset as a wheel, to pip.

    Yields:
        The URL, for `PIP_INDEX_URL`.
    """
    with _Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/simple/"
        finally:
            server.shutdown()
            thread.join()
