"""Benchmarks that a person runs: `longhaul bench NAME`. None of them is a test."""

from .cli import main

__all__ = ["main"]
