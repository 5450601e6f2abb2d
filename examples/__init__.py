"""Example applications for pgtoolset."""
