"""docs/tutorial.md works by its words alone, and a page with a mistake does not."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.docs.package_index import package_index
from tests.docs.walkthrough import Mistake, Reader, steps_of

#: One outcome on every version: it installs what is installed here, and starts servers of its own.
pytestmark = pytest.mark.once

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"

#: What a shell needs to work as it does for a user.
KEPT = ("HOME", "LANG", "TMPDIR", "USER")


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a user who has Python, curl and the programs of the system."""
    programs = folder / "programs"
    programs.mkdir()
    (programs / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin", **variables}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter, as the one who runs PostgreSQL where we are root."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_tutorial(open_folder: Path) -> None:
    """A reader who does what the tutorial says, in an empty folder, gets what it shows."""
    if shutil.which("curl") is None:
        pytest.skip("the tutorial uses curl, which is not installed here")
    wheels, home = open_folder / "wheels", open_folder / "home"
    wheels.mkdir()
    home.mkdir()
    port = str(free_port())
    with package_index(wheels) as index:
        shells = environment(
            open_folder,
            PIP_CONFIG_FILE=os.devnull,
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            PIP_INDEX_URL=index,
            PIP_NO_CACHE_DIR="1",
            UVICORN_PORT=port,
        )
        replaced = {"http://127.0.0.1:8000": f"http://127.0.0.1:{port}"}
        with Reader(home, "boxoffice", shells, replaced) as reader:
            assert reader.follow(PAGE.read_text()) > 20


PROJECT = """
```console
# terminal: commands
$ mkdir project
$ cd project
```

```py
# app/hello.py
print("hello")
print("world")
```
"""

GOOD = """
```py
# app/serve.py
print("echo started 17", flush=True)
input()
```

```diff
# app/hello.py
 print("hello")
-print("world")
+print("moon")
```

```console
# terminal: commands
$ python3 app/hello.py
...
moon
```

```console
# terminal: counting
$ cd project
$ python3 app/serve.py
echo started ...
```

```console
# terminal: commands
$ echo started ...
started 17
```

```console
# terminal: counting
^C
```
"""


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """A reader of small pages."""
    home = tmp_path / "home"
    home.mkdir()
    with Reader(home, "project", environment(tmp_path), limit=60) as reader:
        yield reader


def test_a_page_without_a_mistake(reader: Reader) -> None:
    """Files are written and changed, commands run in their terminals, and dots are filled in."""
    assert reader.follow(PROJECT + GOOD) == 6
    assert (reader.folder / "project" / "app" / "hello.py").read_text().endswith('print("moon")\n')


STREAM = """
```console
# terminal: stream
$ printf 'one\\n\\ntwo\\n\\n'
one
```

```console
# terminal: stream

two

```
"""


def test_a_stream_that_has_ended(reader: Reader) -> None:
    """The rest of a command's output is read, whether the command still runs by then or not."""
    steps = steps_of(PROJECT + STREAM)
    for step in steps[:-1]:
        reader._do(step) if step.language == "console" else reader._write(step)
    reader._terminals["stream"].wait_for_prompt()
    reader._do(steps[-1])


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("moon\n```\n\n```console", "mon\n```\n\n```console", "expected:"),
        ("moon\n```\n\n```console", "moon\nsun\n```\n\n```console", "expected:"),
        ("...\nmoon", "moon", "expected:"),
        ("python3 app/hello.py", "python3 app/helo.py", "expected:"),
        ('-print("world")', '-print("word")', "not there, or more than once"),
        ("# app/hello.py\n print", "# app/helo.py\n print", "is not there yet"),
        ("\necho started ...", "\necho begun ...", "nothing more"),
        ("$ python3 app/serve.py", "$ false", "expected:"),
        ("$ python3 app/serve.py", "$ cat", "nothing more"),
        ("$ echo started ...", "$ echo begun ...", "nothing on the page has printed"),
        ("\n^C\n", "\n$ ls\n", "busy"),
        ("```console\n# terminal: counting\n^C\n```", "", "still runs in counting"),
        ("$ echo started ...\nstarted 17", "$ false", "ended with status 1"),
        ("# terminal: counting\n^C", "^C", "names no terminal"),
        ("# app/hello.py\n print", " print", "names no file"),
    ],
)
def test_a_page_with_a_mistake(reader: Reader, right: str, wrong: str, complaint: str) -> None:
    """Each kind of mistake is found, and the message names the line of the block."""
    assert GOOD.count(right) == 1
    reader.patience = 1
    if complaint == "nothing more":
        reader.limit = 3
    with pytest.raises(Mistake, match=complaint) as mistake:
        reader.follow(PROJECT + GOOD.replace(right, wrong))
    assert str(mistake.value).startswith(("line ", "at the end"))


def test_only_what_the_page_installs(open_folder: Path) -> None:
    """A package that no requirement of the page names cannot be installed nor imported."""
    with package_index(open_folder) as index:
        for name, status in (("uvicorn", 200), ("no-such-package", 404)):
            assert httpx.get(f"{index}{name}/").status_code == status
