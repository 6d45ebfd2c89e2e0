"""Softmax attention over packed documents: the blocks of which every attention engine is made."""

from .mask import Mask, Piece, pieces_from_segments
from .naive import naive_attention
from .varlen import (
    attend_block,
    attend_block_backward,
    attend_varlen,
    attend_varlen_backward,
    attention,
    merge,
)

__all__ = [
    "Mask",
    "Piece",
    "attend_block",
    "attend_block_backward",
    "attend_varlen",
    "attend_varlen_backward",
    "attention",
    "merge",
    "naive_attention",
    "pieces_from_segments",
]
