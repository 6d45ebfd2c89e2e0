"""The language model: embedding, blocks, norm, head. It knows mathematics and a `SequenceShard`.

Legend: T tokens held here, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block
from .config import ModelConfig
from .norm import RMSNorm
from .ops import recompute
from .ops.attention import Mask
from .ops.cross_entropy import linear_cross_entropy
from .sequence import SequenceShard

State = tuple[Any, ...]


class LossOutput(NamedTuple):
    """Sums over the tokens held here: `loss_sum` of weight times negative log likelihood (nats), `weight_sum` of weights.

    In training `loss_sum` also holds `aux_sum`, the auxiliary losses: of each layer, each document's loss times the weight
    of its tokens held here. `aux_sum` is detached, for reports; None if there is none.
    """

    loss_sum: Tensor
    weight_sum: Tensor
    state: State | None
    aux_sum: Tensor | None = None


class Between(NamedTuple):
    """What one layer hands to the next, where a model is cut between layers.

    `x` [T', D]; `memory`, the latest pools of the layers before, in order; `aux_sum`, the auxiliary losses of the layers run,
    as in `LossOutput` but attached: it stays here, and belongs to the objective here. None if there is none.
    """

    x: Tensor
    memory: tuple[Tensor, ...] = ()
    aux_sum: Tensor | None = None


class Layers(nn.ModuleList):
    """Blocks by their number in the whole model, of which some may be elsewhere. Iterates over those that are here."""

    def keep(self, numbers: set[int]) -> None:
        """Drop the others; names stay."""
        for number in {int(name) for name in self._modules} - numbers:
            del self._modules[str(number)]

    def numbered(self) -> Iterator[tuple[int, nn.Module]]:
        """Blocks that are here, each with its number."""
        for name, layer in self._modules.items():
            assert layer is not None
            yield int(name), layer


class LanguageHead(nn.Module):
    """Final norm's output to the vocabulary. Logits of all tokens are never held at once in training."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over tokens of the weighted loss and of the weights; hidden [T, D], labels int64 [T], weights [T]."""
        return linear_cross_entropy(hidden, self.weight, labels, weights)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, vocabulary]."""
        return F.linear(hidden, self.weight.to(hidden.dtype))


class LanguageModel(nn.Module):
    """A decoder over one packed stream.

    Attributes:
        activation_checkpointing: what of a block is recomputed in the backward, sending nothing: "none", "full", or
            "selective", which keeps what is dear (models/ops/recompute.py).
        activation_offload: what is kept for the backward waits in the host's memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = Layers(Block(config, layer) for layer in range(config.num_layers))
        self._pools = [getattr(layer.mixer, "pool_shape", None) for layer in self.layers]
        self._recalled = max((getattr(layer.mixer, "recalls", 0) for layer in self.layers), default=0)  # pools read by one layer
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.norm.weight.no_weight_decay = True  # type: ignore[attr-defined]
        self.head = LanguageHead(config.hidden_size, config.vocab_size)
        if config.tie_embeddings:
            self.head.register_parameter("weight", self.embedding.get_parameter("weight"))
        self.activation_checkpointing = "none"
        self.activation_offload = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters and buffers from the global generator."""
        for name in self.initial_order():
            self.initialise(self.get_submodule(name))

    def initial_order(self) -> list[str]:
        """Parts of the whole model in the order in which they are initialised: `embedding`, `head`, `layers.N`, `norm`."""
        ends = ["embedding"] if self.config.tie_embeddings else ["embedding", "head"]
        return [*ends, *(f"layers.{number}" for number in range(self.config.num_layers)), "norm"]

    def initialise(self, part: nn.Module) -> None:
        """Initialise a part from the global generator."""
        if isinstance(part, Block):
            part.reset_parameters()
        elif isinstance(part, RMSNorm):
            nn.init.ones_(part.weight)
        else:
            nn.init.normal_(part.get_parameter("weight"), std=self.config.initializer_range)

    def fresh(self, name: str) -> nn.Module:
        """A part of the whole model made anew, alone; not yet initialised."""
        config = self.config
        if name.startswith("layers."):
            return Block(config, int(name.removeprefix("layers.")))
        if name == "norm":
            return RMSNorm(config.hidden_size, eps=config.norm_eps)
        if name == "head":
            return LanguageHead(config.hidden_size, config.vocab_size)
        return nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(
        self,
        tokens: Tensor,
        shard: SequenceShard,
        state: State | None = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        layers: range | None = None,
        entering: Between | None = None,
    ) -> tuple[Tensor, State | None] | LossOutput | Between:
        """Hidden states of the tokens held here, or their loss; or, of a model that is cut between layers, what goes on.

        Args:
            tokens: int64 [T].
            shard: which tokens of which stream these are.
            state: one entry a layer, of what came before the stream.
            labels: the next token of the same document, int64 [T], shifted before any sharding; with it the loss is returned.
            weights: of each token in the loss, [T]; ones if left out.
            layers: those to run, by number; all if left out.
            entering: what the layer before the first of them gave; tokens are embedded if left out.

        Returns:
            (hidden [T, D], state), or `LossOutput` if there are labels. The state is None unless `shard.keep_state`.
            `Between` if there are layers after those that are run.
        """
        layers = range(self.config.num_layers) if layers is None else layers
        if labels is not None and weights is None:
            weights = torch.ones_like(labels, dtype=torch.float32)
        x, memory = (self.embedding(tokens), ()) if entering is None else entering[:2]
        states: list[Any] = []
        auxiliary: list[Tensor] = []
        for index in layers:
            layer, before = self.layers.get_submodule(str(index)), None if state is None else state[index]
            out = recompute.checkpoint(
                layer, x, shard, before, memory, mode=self.activation_checkpointing, offload=self.activation_offload
            )
            x = out.x
            states.append(out.state)
            if out.aux is not None:
                auxiliary.append(out.aux)
            if out.pool is not None and self._recalled:
                memory = (*memory, out.pool)[-self._recalled :]
        aux_sum: Tensor | None = None
        if auxiliary and weights is not None and self.training:
            per_document = torch.stack(auxiliary).sum(0)  # [layers, documents] -> [documents]
            aux_sum = (per_document * shard.document_weights(weights)).sum()
        if layers.stop < self.config.num_layers:
            return Between(x, memory, aux_sum)
        hidden, final = self.norm(x), tuple(states) if shard.keep_state else None
        if labels is None:
            return hidden, final
        loss_sum, weight_sum = self.head(hidden, labels, weights)
        if aux_sum is None:
            return LossOutput(loss_sum, weight_sum, final)
        return LossOutput(loss_sum + aux_sum, weight_sum, final, aux_sum.detach())

    def keep(self, spans: Sequence[range]) -> None:
        """Keep some runs of layers only, in place; the embedding with the first layer, norm and head with the last.

        A tied embedding is kept with either, under the one name it has in the whole model. Before heads are cut.
        """
        kept = {number for span in spans for number in span}
        first, last = 0 in kept, self.config.num_layers - 1 in kept
        self.layers.keep(kept)
        if not first and not (last and self.config.tie_embeddings):
            self.embedding = None  # type: ignore[assignment]
        if not last:
            self.norm = None  # type: ignore[assignment]
        if not last and not (first and self.config.tie_embeddings):
            self.head = None  # type: ignore[assignment]

    def between_shapes(self, shard: SequenceShard, layer: int) -> list[tuple[int, ...]]:
        """Shapes of what enters a layer: x, then those pools of the layers before it, held here or not, that may be read."""
        rows = shard.share(torch.empty(shard.num_tokens, 0)).shape[0]
        pools = [shape(shard.segments) for shape in self._pools[:layer] if shape is not None]
        return [(rows, self.config.hidden_size), *(pools[-self._recalled :] if self._recalled else ())]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, vocabulary]."""
        return self.head.logits(hidden)

    def sublayers(self) -> Iterator[tuple[str, nn.Module]]:
        """Mixers and feed-forward layers by name: what adds to the stream of tokens, a sum over heads."""
        for index, layer in self.layers.numbered():
            for name in ("mixer", "ffn"):
                module = getattr(layer, name)
                if module is not None:
                    yield f"layers.{index}.{name}", module

    def needs(self) -> tuple[bool, list[Mask]]:
        """What a sequence-parallel engine must serve: whether states go along the sequence, and attention masks."""
        mixers = [layer.mixer for layer in self.layers if layer.mixer is not None]
        masks = [mixer.mask for mixer in mixers if hasattr(mixer, "mask")]
        return len(masks) < len(mixers), masks  # type: ignore[return-value]

    def flops_per_token(self, seq_length: int) -> int:
        """Forward and backward FLOPs of one token of a document of `seq_length` tokens.

        Three times the forward. Causal attention counts half its square; linear layers count their recurrent form, not the
        chunked products that compute it; recomputation is not counted.
        """
        forward = sum(layer.flops_per_token(seq_length) for layer in self.layers)  # type: ignore[operator]
        forward += 2 * self.config.vocab_size * self.config.hidden_size
        return 3 * forward
