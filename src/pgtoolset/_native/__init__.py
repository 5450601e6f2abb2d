"""The two hot modules, each behind a slot that is typed by its protocol."""
