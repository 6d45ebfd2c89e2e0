"""The one-page report of a run, made from its folder alone: `longhaul report FOLDER`."""

from .write import main, write_report

__all__ = ["main", "write_report"]
