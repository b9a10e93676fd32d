"""Variants of one job on shared tables, and their comparison."""
