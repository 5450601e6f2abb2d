"""The two hot modules, each behind a slot that is typed by its protocol."""

from pgtoolset._native import associations as _python_associations
from pgtoolset.protocols import AssociationRows

__all__ = ["association_rows"]

association_rows: AssociationRows = _python_associations
