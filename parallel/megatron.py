"""Our mixers and sequence-parallel engines inside megatron-core models, as the `self_attention` of a transformer layer.

    Megatron                                  here
    hidden states [s, b, h]                   a stream of b s tokens; every row of the batch is a document
    packed_seq_params (b = 1)                 the documents of the row
    context-parallel group                    the sequence group
    tensor-parallel group                     the owners of heads
    config.sequence_parallel                  input all-gathered, output reduce-scattered; else copied and all-reduced

Gradient convention: with Megatron a replicated activation has its whole cotangent on every tensor rank, so the adjoint of an
all-reduce is the identity and that of a copy an all-reduce. Inside a mixer a rank's cotangents are its own heads' part, which is
our convention. Parameters that heads share get the sum of their parts in the backward, by hooks, with every micro-batch: Megatron
then finds the whole gradient on every tensor rank, and must not sum it again (`sequence_parallel` is False).
Over context-parallel ranks gradients are parts, as Megatron's own are. The mappings are ours: Megatron's ask for a CUDA device.

Megatron's package is imported inside functions only, and its global groups are read nowhere but here.

Letters: s tokens of a row held here, b rows, h width, t tensor ranks, P context-parallel ranks, T = b s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.heads import Kept, Narrowable, narrow
from longhaul.models.mixers.registry import MIXERS
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard

from .comm import Comm
from .engine import TWO_LEVELS, SequenceParallel
from .functional import copy_to_heads, gather_rows, scatter_sum, sum_from_heads
from .layout import SequenceLayout

LAYOUTS = ("contiguous", "zigzag")


def mixer_spec(
    model: ModelConfig,
    mixer: str = "mamba2",
    exchange: str = "all_gather",
    attention: str = "ring",
    layout: str = "contiguous",
    seed: int = 0,
) -> Any:
    """A `ModuleSpec` for the `self_attention` slot of a Megatron transformer layer.

    Args:
        model: widths, heads and options of the mixer; `hidden_size` is Megatron's.
        mixer: its name (`longhaul.models.mixers.registry`).
        exchange: how recurrent states travel over the context-parallel ranks.
        attention: how softmax attention reaches the other ranks.
        layout: what tokens of a row a rank holds: contiguous (a run), or zigzag (runs r and 2P - 1 - r of 2P, which is the order
            of Megatron's `get_batch_on_this_cp_rank`).
        seed: of the initial weights, with the layer's number.

    Raises:
        UserError: megatron-core is missing, or cannot be served so.
    """
    if mixer not in MIXERS:
        raise UserError(f"mixer {mixer!r} is none of {', '.join(MIXERS)}.")
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is no order of Megatron's tokens; choose from {', '.join(LAYOUTS)}.")
    for engine in (exchange, attention):
        if engine in TWO_LEVELS:
            raise UserError(f"{engine} needs groups inside and across nodes, which Megatron does not give; use ring.")
    try:
        from megatron.core.transformer.spec_utils import ModuleSpec
    except ImportError as error:
        raise UserError(
            f"mixer_spec needs megatron-core, which cannot be imported ({error}): run pip install 'longhaul[megatron]'."
        ) from None
    options = {"exchange": exchange, "attention": attention, "layout": f"{layout}_per_document"}
    return ModuleSpec(MegatronMixer, params={"model": model, "mixer": mixer, "engine": options, "seed": seed})


class MegatronMixer(nn.Module):
    """A mixer, narrowed to this tensor rank's heads. [s, b, h] -> [s, b, h] and no bias; s / t with `sequence_parallel`.

    Args:
        config: Megatron's `TransformerConfig`.
        layer_number: from 1.
        pg_collection: Megatron's groups (`tp`, `cp`); its global ones if None.
        model, mixer, engine, seed: of `mixer_spec`.
        cp_comm_type: Megatron's own choice for its attention; not read.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        pg_collection: Any = None,
        cp_comm_type: str | None = None,
        *,
        model: ModelConfig,
        mixer: str,
        engine: dict[str, Any],
        seed: int,
    ) -> None:
        super().__init__()
        if model.hidden_size != config.hidden_size:
            raise UserError(f"hidden_size is {model.hidden_size} here, but {config.hidden_size} for Megatron: make them equal.")
        tensor_group, context_group = _groups(pg_collection)
        self.tensor, self.sequence_parallel = Comm(tensor_group), bool(config.sequence_parallel)
        self.engine = SequenceParallel(Comm(context_group), tensor=self.tensor, **engine)
        with torch.random.fork_rng(devices=[]):  # whole and alike on every rank, whatever Megatron's generators do
            torch.manual_seed(seed + layer_number)
            built: Any = MIXERS[mixer].build(model, layer_number - 1)
            built.reset_parameters()
        self.mixer: nn.Module = built
        for plug, what in (("recall", "notes for later layers"), ("auxiliary", "an auxiliary loss")):
            if hasattr(self.mixer, plug):
                raise UserError(f"{mixer} has {what}, which a Megatron layer has no place for: use another mixer.")
        mask = getattr(self.mixer, "mask", None)
        self.engine.check(recurrent=mask is None, masks=() if mask is None else (mask,))
        self.narrowed = isinstance(self.mixer, Narrowable)
        self.kept: dict[str, Kept] = {}
        if self.tensor.size > 1 and self.narrowed:
            self.kept = narrow(self.mixer, self.tensor.rank, self.tensor.size)
        self.mixer.to(dtype=config.params_dtype)
        if not config.use_cpu_initialization and torch.cuda.is_available():
            self.mixer.to(device=torch.cuda.current_device())
        self._shard: tuple[Any, SequenceShard] | None = None
        for name, parameter in self.mixer.named_parameters():
            self._describe(parameter, self.kept.get(name))

    def _describe(self, parameter: Any, kept: Kept | None) -> None:
        """What Megatron's optimizer asks of a parameter, and the sum of a shared one's gradient."""
        parameter.tensor_model_parallel = kept is not None
        parameter.partition_dim, parameter.partition_stride = (-1, 1) if kept is None else (kept.axis, 1)
        parameter.sequence_parallel = False
        if self.tensor.size > 1 and (kept is None or any(held.sharing > 1 for held in kept.ranges)):
            parameter.register_hook(_summed(kept, self.tensor))

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, packed_seq_params: Any = None, **others: Any
    ) -> tuple[Tensor, None]:
        """`attention_mask` and Megatron's rotary tables are not read: a mixer has its own.

        Raises:
            UserError: inference, which Megatron drives by its own caches; or documents that do not divide as the layout says.
        """
        if others.get("inference_context") is not None or others.get("inference_params") is not None:
            raise UserError("Longhaul's mixers inside Megatron only train: load the weights into longhaul generate instead.")
        tensor = self.tensor
        if self.sequence_parallel:
            x = gather_rows(hidden_states, hidden_states.shape[0] * tensor.size, tensor, "to heads")
        else:
            x = copy_to_heads(hidden_states, tensor)
        length, rows, _ = x.shape
        shard = self._stream(length, rows, packed_seq_params, x.device)
        y, _ = self.mixer(x.transpose(0, 1).flatten(0, 1), shard)  # [s, b, h] -> [T, h]
        y = y.unflatten(0, (rows, length)).transpose(0, 1)
        if not self.narrowed:
            y = y / tensor.size  # every rank ran all of it
        return (scatter_sum(y, tensor, "from heads") if self.sequence_parallel else sum_from_heads(y, tensor)), None

    def _stream(self, length: int, rows: int, packed: Any, device: torch.device) -> SequenceShard:
        """Rows, or the documents packed in one, as this rank's part of a stream. That of the last micro-batch is kept."""
        ranks = self.engine.comm.size
        whole = length * ranks
        bounds = tuple(range(0, whole * rows + 1, whole)) if packed is None else _packed_bounds(packed)
        if self._shard is not None and self._shard[0] == (bounds, rows, device):
            return self._shard[1]
        if bounds[-1] != whole * rows or (packed is not None and rows != 1):
            raise UserError(
                f"cu_seqlens end at {bounds[-1]}, but {rows} rows of {length} tokens on {ranks} context-parallel ranks hold "
                f"{whole * rows}: give one row, and the bounds of the whole of it."
            )
        pieces = ranks * (2 if self.engine.layout_name.startswith("zigzag") else 1)
        if ranks > 1 and any((stop - start) % pieces for start, stop in zip(bounds, bounds[1:])):
            raise UserError(f"With {ranks} context-parallel ranks a document's length must be a multiple of {pieces}: pad it.")
        documents = Documents(bounds)
        layout = SequenceLayout.make(self.engine.layout_name, documents, ranks) if ranks > 1 else None
        shard = self.engine.shard(documents, device, layout=layout)
        self._shard = (bounds, rows, device), shard
        return shard

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refused: a fused projection is cut run by run, which Megatron's distributed checkpoint has no word for."""
        raise UserError("Megatron's distributed checkpoint does not know Longhaul's cuts: save state_dict() of each tensor rank.")


def _groups(collection: Any) -> tuple[Any, Any]:
    """Tensor and context-parallel group."""
    if collection is not None:
        return collection.tp, collection.cp
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()


def _packed_bounds(packed: Any) -> tuple[int, ...]:
    """Bounds of documents; padding at a document's end belongs to it, and no earlier token sees it."""
    padded = packed.cu_seqlens_q_padded
    bounds = packed.cu_seqlens_q if padded is None else padded
    return tuple(bounds.tolist())


def _summed(kept: Kept | None, comm: Comm) -> Callable[[Tensor], Tensor]:
    """A hook that adds up, over tensor ranks, the gradient of what several of them hold."""

    def hook(grad: Tensor) -> Tensor:
        if kept is None:
            return comm.all_reduce(grad, "shared gradients").wait()
        whole = grad.clone()
        start = 0
        for held in kept.ranges:
            length = held.stop - held.start
            if held.sharing > 1:
                view = whole.narrow(kept.axis, start, length)
                slots = view.new_zeros(comm.size // held.sharing, *view.shape)
                slots[held.slot] = view
                view.copy_(comm.all_reduce(slots, "shared gradients").wait()[held.slot])
            start += length
        return whole

    return hook
