"""The two hot modules, each behind a slot that is typed by its protocol."""

from pgtoolset._native import associations as _python_associations
from pgtoolset._native import comparator as _python_comparator
from pgtoolset.protocols import AssociationRows, RowComparator

__all__ = ["association_rows", "row_comparator"]

association_rows: AssociationRows = _python_associations
row_comparator: RowComparator = _python_comparator
