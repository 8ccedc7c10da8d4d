"""Outlier detection on real tables: the parts of benchmarks/tables.py."""
