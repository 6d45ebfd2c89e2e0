"""What one process holds of a tensor: rectangles of the whole one, as torch's distributed checkpoints want them.

A parameter may be cut several times: by heads or vocabulary (runs of one axis, `Kept`), by experts (of another axis), and what
is left along its first axis by FSDP2 (a DTensor). Whatever the topology, a checkpoint names and measures the whole tensor, and
each process writes and reads the rectangles it holds: nothing is gathered. Processes that hold the same rectangle have it at
the same place, so the checkpoint's planner writes it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from longhaul.models.heads import Kept


class Piece(NamedTuple):
    """A rectangle of a whole tensor: where it begins, and a view of what is held of it."""

    offsets: tuple[int, ...]
    tensor: Tensor


class Pieces(Tensor):
    """A whole tensor of which this process holds some rectangles. It knows its shape, and cannot be computed with.

    It is a tensor only because checkpoints ask for one; the three methods in dunders are their protocol
    (torch.distributed._checkpointable).
    """

    held: tuple[Piece, ...]

    @staticmethod
    def __new__(cls, shape: Sequence[int], held: Sequence[Piece], like: Tensor) -> Pieces:
        whole: Pieces = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=like.dtype, device=like.device)
        whole.held = tuple(held)
        return whole

    def __init__(self, shape: Sequence[int], held: Sequence[Piece], like: Tensor) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{function} of a tensor of which this process holds only pieces")

    def copied(self) -> Pieces:
        """The same with copies of the rectangles, on the CPU."""
        held = [Piece(piece.offsets, piece.tensor.detach().to("cpu", copy=True)) for piece in self.held]
        return Pieces(self.shape, held, torch.empty(0, dtype=self.dtype))

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(piece.tensor), self.shape),
            )
            for chunk, piece in zip(self.__create_chunk_list__(), self.held)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape) for piece in self.held]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return next(piece.tensor for piece in self.held if piece.offsets == tuple(index.offset))


def as_pieces(tensor: Tensor, cuts: Sequence[Kept]) -> Tensor:
    """What is held of a tensor, for a checkpoint: itself where nothing but FSDP2 cuts it.

    Args:
        tensor: the parameter here, or a tensor of its shape (its optimizer's state); maybe a DTensor.
        cuts: of the whole parameter, each along another axis.
    """
    if not cuts:
        return tensor
    tensor = tensor.detach()
    local, offsets = local_part(tensor)
    found = [Piece(offsets, local)]
    for cut in cuts:
        found = [part for piece in found for part in _split(piece, cut)]
    return Pieces(whole_shape(tensor.shape, cuts), [piece for piece in found if piece.tensor.numel()], local)


def whole_shape(shape: Sequence[int], cuts: Sequence[Kept]) -> tuple[int, ...]:
    """The shape of the whole of which cuts left `shape`."""
    whole = list(shape)
    for cut in cuts:
        whole[cut.axis] = cut.shape[cut.axis]
    return tuple(whole)


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What is here of a DTensor, and where it begins; of another tensor all of it."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offsets)


def _split(piece: Piece, cut: Kept) -> Iterator[Piece]:
    """The parts of a rectangle of what is kept, as rectangles of the whole."""
    axis, first, length = cut.axis, piece.offsets[cut.axis], piece.tensor.shape[cut.axis]
    start = 0
    for held in cut.ranges:
        low, high = max(start, first), min(start + held.stop - held.start, first + length)
        if high > low:
            offsets = (*piece.offsets[:axis], held.start + low - start, *piece.offsets[axis + 1 :])
            yield Piece(offsets, piece.tensor.narrow(axis, low - first, high - low))
        start += held.stop - held.start
