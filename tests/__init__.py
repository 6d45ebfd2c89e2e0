"""Tests are a package: the ranks of the pool import test modules by name."""
