"""Mixture of experts: a feed-forward layer of which every token uses a few parts.

Shazeer et al., "Outrageously Large Neural Networks" (arXiv 1701.06538), with SwiGLU experts, renormalised top-k scores
(Mixtral, arXiv 2401.04088) and no capacity: no token is dropped (MegaBlocks, arXiv 2211.15841).

    p = softmax(W_r x)                       router, in float32 at least, over E experts
    g = p of the k largest, divided by their sum
    y = sum_e g_e SwiGLU_e(x)  (+ SwiGLU_shared(x))

Which process holds an expert is the business of `MoE.dispatch`; here all are at hand.

Router, experts and outputs are token-local. The balance loss is not: it is defined per document, whatever is packed beside it
and wherever its tokens lie. For document d of n tokens, as in Switch Transformer (arXiv 2101.03961, eq. 4-6),

    f_e = (choices of e in d) / (k n)        P_e = (sum of p_e over d) / n        balance_d = E sum_e f_e P_e

which is 1 if all experts are used alike, and its gradient flows through P. The z loss (ST-MoE, arXiv 2202.08906) of a document
is the mean squared log-sum-exp of its router logits. The layer gives `aux [documents]`, their weighted sum, the same
everywhere; the model adds `sum_t weight_t aux_document(t)` over the tokens held here to its loss sum, so that summed over
ranks and divided by the global weight each document counts by its tokens, as in the main loss.

A document that goes on from an earlier stream counts by its tokens in this stream.

Legend: T tokens held here, D model width, E experts, k experts of a token, F inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .balance import routing_means
from .errors import UserError
from .ffn import SwiGLU
from .heads import Cut
from .sequence import SequenceShard


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture-of-experts feed-forward."""

    num_experts: int = 8
    """E."""

    top_k: int = 2
    """k: experts each token uses."""

    expert_hidden_size: int | None = None
    """F, the inner width of one expert; that of the SwiGLU it replaces if left out."""

    shared_hidden_size: int = 0
    """Inner width of an expert that every token uses besides; 0 is none."""

    balance_weight: float = 0.01
    """Of the balance loss, per layer."""

    z_weight: float = 0.0
    """Of the router's z loss, per layer."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"moe.top_k {self.top_k} must lie between 1 and moe.num_experts {self.num_experts}.")
        for name in ("balance_weight", "z_weight", "shared_hidden_size"):
            if getattr(self, name) < 0:
                raise UserError(f"moe.{name} cannot be negative, but is {getattr(self, name)}.")


class Experts(nn.Module):
    """Rows sorted by expert -> the same rows through their experts, [R, D] -> [R, D]."""

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def forward(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """One pair of products an expert; `sizes`: how many of the rows each has."""
        outputs = []
        for own, gate_up, down in zip(rows.split(list(sizes)), self.gate_up.unbind(), self.down.unbind()):
            gate, up = F.linear(own, gate_up.to(rows.dtype)).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down.to(rows.dtype)))
        return torch.cat(outputs)


class Dispatch(Protocol):
    """How rows reach experts: rows [R, D] sorted by expert, how many each of all experts has, and the experts held here.

    Returns the rows' outputs in the same order, [R, D].
    """

    def __call__(self, rows: Tensor, sizes: Sequence[int], experts: Experts) -> Tensor: ...


def all_here(rows: Tensor, sizes: Sequence[int], experts: Experts) -> Tensor:
    """All experts are held here."""
    output: Tensor = experts(rows, sizes)
    return output


class MoE(nn.Module):
    """[T, D] -> [T, D], and the auxiliary loss of each document of the stream."""

    def __init__(self, hidden_size: int, ffn_width: int, config: MoEConfig, initializer_range: float = 0.02) -> None:
        super().__init__()
        self.config, self.initializer_range = config, initializer_range
        width = config.expert_hidden_size if config.expert_hidden_size is not None else ffn_width
        self.router = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.experts = Experts(config.num_experts, hidden_size, width)
        self.dispatch: Dispatch = all_here
        shared = config.shared_hidden_size
        self.shared = SwiGLU(hidden_size, shared, initializer_range) if shared else None

    def reset_parameters(self) -> None:
        """N(0, initializer_range), as the SwiGLU."""
        for weight in (self.router, self.experts.gate_up, self.experts.down):
            nn.init.normal_(weight, std=self.initializer_range)
        if self.shared is not None:
            self.shared.reset_parameters()

    def forward(self, x: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor | None]:
        """The layer and its auxiliary loss.

        Returns:
            [T, D], and [documents of the stream], replicated; None if no auxiliary loss has a weight.
        """
        wide = torch.promote_types(torch.float32, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.router.to(wide))  # [T, E]
            probabilities = logits.softmax(-1)
            scores, chosen = probabilities.topk(self.config.top_k, dim=-1)  # [T, k]
            scores = scores / scores.sum(-1, keepdim=True)
        y = self._mix(x, scores, chosen)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, self._auxiliary(logits, probabilities, chosen, shard)

    def _mix(self, x: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """Every token through its experts: rows sorted by expert (stably), wherever the experts are."""
        num_tokens, k = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # [T k]
        sizes = chosen.flatten().bincount(minlength=self.config.num_experts).tolist()
        outputs = self.dispatch(x[order // k], sizes, self.experts)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        each = outputs[back].unflatten(0, (num_tokens, k))  # [T k, D] -> [T, k, D], in the tokens' order
        return (each * scores[..., None].to(each.dtype)).sum(1)

    def _auxiliary(self, logits: Tensor, probabilities: Tensor, chosen: Tensor, shard: SequenceShard) -> Tensor | None:
        config = self.config
        if not config.balance_weight and not config.z_weight:
            return None
        f, P, z = routing_means(probabilities, chosen, shard, logits.logsumexp(-1, keepdim=True).square())
        balance = config.num_experts / config.top_k * (f.detach() * P).sum(1)
        return config.balance_weight * balance + config.z_weight * z[:, 0]

    def cuts(self) -> dict[str, Cut]:
        """Every expert's inner width. The router is shared: all owners route alike."""
        width = (self.experts.down.shape[2], 1)
        cuts = {"experts.gate_up": Cut(1, (width, width)), "experts.down": Cut(2, (width,))}
        if self.shared is not None:
            cuts.update({f"shared.{name}": cut for name, cut in self.shared.cuts().items()})
        return cuts

    def keep_heads(self, part: int, parts: int) -> None:
        """Nothing to note: widths are the weights'."""

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token: the router, k experts and the shared one."""
        experts = (self.experts.gate_up[0].numel() + self.experts.down[0].numel()) * self.config.top_k
        shared = 0 if self.shared is None else self.shared.flops_per_token()
        return 2 * (self.router.numel() + experts) + shared
