"""Tensor parallelism: each rank owns some heads of every layer and some rows of the vocabulary.

Between layers the ranks divide the tokens (Megatron's sequence-parallel regions, arXiv 2205.05198), inside a layer the heads:

    x [T/t, D] --all-gather--> [T, D] --layer with H/t heads--> partial y [T, D] --reduce-scatter--> [T/t, D]

The model says where (`shard.to_heads`, `shard.from_heads`); what is sent is in `shard.py`. The objective is the sum over ranks
of local losses here too, so a gradient on a rank is that rank's part: parameters that all heads share are summed over the
group once a step, those that are cut are not. Slicing is our own, not DTensor's: a fused projection (z | x | B | C | dt)
is cut in each of its runs, and a parameter's heads may be shared by some ranks and not by others.

Letters: t ranks, V vocabulary, T tokens of the sequence rank, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longhaul.models.encoder import Encoder
from longhaul.models.errors import UserError
from longhaul.models.heads import Kept, Narrowable, Range, keep_slices, narrow
from longhaul.models.lm import LanguageModel

from .comm import Comm
from .pieces import local_part
from .vocabulary import VocabularyParallelEmbedding, VocabularyParallelHead


class TensorParallel:
    """A model narrowed, in place, to the heads and the vocabulary of one rank.

    Args:
        model: whole and alike on every rank, a decoder or an encoder; before data parallelism shards it.
        comm: the tensor group.

    Raises:
        UserError: a layer's heads do not divide so.
    """

    def __init__(self, model: LanguageModel | Encoder, comm: Comm) -> None:
        self.model, self.comm = model, comm
        self.kept: dict[str, Kept] = {}
        """What is held of each parameter that is cut, by its name in the model."""
        if comm.size == 1:
            return
        for name, layer in model.sublayers():
            if isinstance(layer, Narrowable):
                cut = narrow(layer, comm.rank, comm.size)
                self.kept.update({f"{name}.{parameter}": kept for parameter, kept in cut.items()})
            elif hasattr(layer, "recall"):
                raise UserError(
                    f"{type(layer).__name__} reads earlier layers and says nothing of its heads, so tensor parallelism cannot "
                    "divide it: give it cuts() and keep_heads(), or leave parallel.tensor_parallel_size at 1."
                )
            else:
                layer.register_forward_hook(self._counted_once)
        self._cut_vocabulary()

    def _cut_vocabulary(self) -> None:
        model, comm = self.model, self.comm
        rows, width = model.config.vocab_size, model.config.hidden_size
        start, stop = comm.rank * rows // comm.size, (comm.rank + 1) * rows // comm.size
        kept = Kept((rows, width), 0, (Range(start, stop, 1, comm.rank),))
        held = [module for module in (model.embedding, model.head) if module is not None]  # of a stage of layers, maybe none
        tied = len(held) == 2 and model.head.weight is model.embedding.weight
        for module in held:
            keep_slices(module, "weight", kept)
        if tied:
            model.head.register_parameter("weight", model.embedding.get_parameter("weight"))
        if model.embedding is not None:
            weight = model.embedding.get_parameter("weight")
            model.embedding = VocabularyParallelEmbedding(weight, start, comm)  # type: ignore[assignment]
            self.kept["embedding.weight"] = kept
        if model.head is not None:
            model.head = VocabularyParallelHead(model.head.weight, start, comm)  # type: ignore[assignment]
            self.kept["head.weight"] = kept

    def _counted_once(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        """The output of a layer that every rank runs whole, for a sum over ranks."""
        if isinstance(output, Tensor):
            return output / self.comm.size
        return (output[0] / self.comm.size, *output[1:])

    def sum_shared_gradients(self) -> None:
        """Add up the gradients of what ranks share, in one message. After the backward, before they are read."""
        if self.comm.size == 1:
            return
        shared = list(self._shared())
        if not shared:
            return
        flat = torch.cat([_in_slot(view, slot, slots).flatten() for view, slot, slots in shared])
        total = self.comm.all_reduce(flat, "shared gradients").wait()
        start = 0
        for view, slot, slots in shared:
            stop = start + slots * view.numel()
            view.copy_(total[start:stop].view(slots, *view.shape)[slot])
            start = stop

    def _shared(self) -> Iterator[tuple[Tensor, int, int]]:
        """Views of gradients that several ranks hold: each with its place among `slots` different ones."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                continue
            for view, held in local_ranges(parameter.grad, self.kept.get(name)):
                if held is None:
                    yield view, 0, 1
                elif held.sharing > 1:
                    yield view, held.slot, self.comm.size // held.sharing

    def square_norm(self, gradient: Tensor, name: str) -> Tensor:
        """This rank's share of a gradient's squared norm, float64 []: summed over ranks each element counts once."""
        square = torch.zeros((), dtype=torch.float64, device=gradient.device)
        for view, held in local_ranges(gradient, self.kept.get(name)):
            if view.numel():
                norm = torch.linalg.vector_norm(view, dtype=torch.promote_types(view.dtype, torch.float32))
                square += norm**2 / (self.comm.size if held is None else held.sharing)
        return square


def local_ranges(tensor: Tensor, kept: Kept | None) -> Iterator[tuple[Tensor, Range | None]]:
    """Views of what this process holds of a tensor, one for each kept range; the whole and None if it is not cut.

    A DTensor is sharded along its first axis, within what is kept.
    """
    local, offsets = local_part(tensor)
    first = offsets[0] if offsets else 0
    if kept is None:
        yield local, None
        return
    start = 0
    for held in kept.ranges:
        length = held.stop - held.start
        low, high = start, start + length
        if kept.axis == 0:
            low, high = max(low - first, 0), min(high - first, local.shape[0])
        if high > low:
            yield local.narrow(kept.axis, low, high - low), held
        start += length


def _in_slot(view: Tensor, slot: int, slots: int) -> Tensor:
    """[...] -> [slots, ...], zero but for one."""
    if slots == 1:
        return view[None]
    whole = view.new_zeros(slots, *view.shape)
    whole[slot] = view
    return whole
