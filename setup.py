"""Builds the compiled modules; everything else is in pyproject.toml.

A compiled module has the source of an interpreted one and a name of its own, so that both can be
imported. Without Cython or a compiler the package is installed without them, with a warning. Two
variables of the environment decide otherwise: PGTOOLSET_NO_EXTENSIONS=1 builds none, and with
PGTOOLSET_REQUIRE_EXTENSIONS=1 one that is missing is an error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

PACKAGE = "pgtoolset._native"
MODULES = ("associations", "comparator")

#: `auto_pickle` and `autotestdict` would put names into the modules that their stubs do not have.
DIRECTIVES = {
    "language_level": 3,
    "freethreading_compatible": True,
    "auto_pickle": False,
    "autotestdict": False,
    "binding": True,
}


def is_set(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable} must be 1 or 0, not {value!r}")
    return value == "1"


def extensions() -> dict[str, Any]:
    """The arguments of `setup` that have the compiled modules built."""
    skip, require = is_set("PGTOOLSET_NO_EXTENSIONS"), is_set("PGTOOLSET_REQUIRE_EXTENSIONS")
    if skip and require:
        raise SystemExit(
            "PGTOOLSET_NO_EXTENSIONS and PGTOOLSET_REQUIRE_EXTENSIONS exclude one another; set "
            "one of them"
        )
    if skip:
        return {}
    try:
        from Cython.Build import build_ext
        from Cython.Distutils import Extension
    except ModuleNotFoundError:
        if require:
            raise SystemExit(
                "PGTOOLSET_REQUIRE_EXTENSIONS is set, but Cython is not installed"
            ) from None
        print(
            "WARNING: without Cython, pgtoolset is built without its compiled modules",
            file=sys.stderr,
        )
        return {}

    class BuildWithStubs(build_ext):
        """Puts the stub of a module beside it, once that has been built."""

        def build_extension(self, ext: Any) -> None:
            super().build_extension(ext)
            built = Path(self.get_ext_fullpath(ext.name))
            if not self.inplace and built.exists():
                stub = Path("stubs", *ext.name.split(".")).with_suffix(".pyi")
                self.copy_file(str(stub), str(built.parent / stub.name))

    modules = [
        Extension(
            f"{PACKAGE}.{module}_c",
            [f"src/{PACKAGE.replace('.', '/')}/{module}.py"],
            cython_directives=DIRECTIVES,
            extra_compile_args=[] if os.name == "nt" else ["-g0"],
            cython_c_in_temp=True,  # keeps the generated C out of the source tree and the wheel
            optional=not require,
        )
        for module in MODULES
    ]
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildWithStubs}}


setup(**extensions())
