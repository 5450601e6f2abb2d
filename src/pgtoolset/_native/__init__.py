"""The two hot modules, each in a variable that is typed by its protocol.

Each has one source and two names: interpreted it is `comparator`, compiled it is `comparator_c`.
The compiled modules are used where both can be imported. The environment variable PGTOOLSET_IMPL,
`c` or `python`, forces one of the two.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pgtoolset.protocols import AssociationRows, RowComparator

__all__ = ["association_rows", "implementation", "row_comparator"]


def _compiled() -> tuple[Literal["c"], AssociationRows, RowComparator]:
    import pgtoolset._native.associations_c as associations_c
    import pgtoolset._native.comparator_c as comparator_c

    return "c", associations_c, comparator_c


def _interpreted() -> tuple[Literal["python"], AssociationRows, RowComparator]:
    from pgtoolset._native import associations, comparator

    return "python", associations, comparator


def _chosen() -> tuple[Literal["c", "python"], AssociationRows, RowComparator]:
    forced = os.environ.get("PGTOOLSET_IMPL", "")
    if forced not in ("", "c", "python"):
        raise ImportError(
            f"PGTOOLSET_IMPL must be 'c' or 'python', or not be set; it is {forced!r}"
        )
    if forced == "python":
        return _interpreted()
    try:
        return _compiled()
    except ImportError as error:
        if forced:
            raise ImportError(
                "PGTOOLSET_IMPL=c, but the compiled modules of pgtoolset cannot be imported: "
                f"{error}. Install a wheel that has them, or build with a C compiler and "
                "PGTOOLSET_REQUIRE_EXTENSIONS=1; or unset PGTOOLSET_IMPL"
            ) from error
        return _interpreted()


#: Which implementation is in use.
implementation: Literal["c", "python"]
association_rows: AssociationRows
row_comparator: RowComparator
implementation, association_rows, row_comparator = _chosen()
