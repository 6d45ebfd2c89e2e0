"""What a trained model can do, measured on held-out documents: `longhaul evaluate NAME RUN_FOLDER`."""

from .cli import main

__all__ = ["main"]
