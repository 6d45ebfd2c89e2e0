"""What models can do: `longhaul evaluate NAME` measures a run on held-out documents, or trains small models itself."""

from .cli import main

__all__ = ["main"]
