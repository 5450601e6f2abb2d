"""Measurements of pgtoolset as ratios against something real in the same run. See README.md."""
