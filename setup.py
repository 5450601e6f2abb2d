"""Everything is in pyproject.toml; this file is where the compiled modules will be built."""

from setuptools import setup

setup()
