"""Bounded pools of noted tokens: which are kept, who may read them, and how pools of consecutive tokens merge."""

from .cells import Cells, pool_cells
from .notes import POLICIES, make_notes, positions_of
from .read import read
from .select import PoolMerge, Selection

__all__ = ["POLICIES", "Cells", "PoolMerge", "Selection", "make_notes", "pool_cells", "positions_of", "read"]
