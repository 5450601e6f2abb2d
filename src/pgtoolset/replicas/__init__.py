"""Reads on standbys that never show less than the reader has written: tokens of positions."""

from pgtoolset.replicas.dependencies import create_read_dependency
from pgtoolset.replicas.reading import ReadReplicas

__all__ = ["ReadReplicas", "create_read_dependency"]
