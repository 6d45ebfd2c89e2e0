"""Expert parallelism: each rank of a group holds some experts of every mixture, and tokens travel to them.

    rows sorted by expert --all-to-all--> rows of own experts --experts--> outputs --all-to-all--> rows as they were

A group is some neighbours of the data x sequence ranks, which hold different tokens. How many rows go where is known only from
the router, so a small message of counts goes first; nothing is padded and no token is dropped. All ranks send equally often,
those without a token too. Gradients of experts are sums over all tokens that came, so what is left to sum is over the ranks that
hold the same experts in other groups.

Letters: P ranks of the group, E experts, e = E / P held here, R rows of this rank's tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longhaul.models.errors import UserError
from longhaul.models.heads import Kept, Range, keep_slices
from longhaul.models.lm import LanguageModel
from longhaul.models.moe import Experts, MoE
from longhaul.models.ops import recompute

from .comm import Comm
from .functional import exchange_rows


class ExpertParallel:
    """A model whose mixtures keep, in place, the experts of one rank.

    Args:
        model: its experts whole and alike on every rank; after heads are divided, before data parallelism shards it.
        comm: the expert group.
        copies: the ranks that hold the same experts.

    Raises:
        UserError: the experts do not divide so.
    """

    def __init__(self, model: LanguageModel, comm: Comm, copies: Comm) -> None:
        self.model, self.comm, self.copies = model, comm, copies
        self.kept: dict[str, Kept] = {}
        """What is held of each parameter of experts, by its name in the model."""
        self.modules: list[Experts] = []
        if comm.size == 1:
            return
        for name, layer in model.sublayers():
            if not isinstance(layer, MoE):
                continue
            count = layer.config.num_experts
            if count % comm.size:
                raise UserError(
                    f"parallel.expert_parallel_size {comm.size} does not divide moe.num_experts {count}: change one of the two."
                )
            start, stop = comm.rank * count // comm.size, (comm.rank + 1) * count // comm.size
            for leaf, parameter in list(layer.experts.named_parameters()):
                kept = Kept(tuple(parameter.shape), 0, (Range(start, stop, 1, comm.rank),))
                keep_slices(layer.experts, leaf, kept)
                self.kept[f"{name}.experts.{leaf}"] = kept
            layer.dispatch = Travel(comm)
            self.modules.append(layer.experts)

    def sum_gradients(self) -> None:
        """Add up the gradients of the same experts, in one message; where nothing else does."""
        parameters = [parameter for experts in self.modules for parameter in experts.parameters()]
        if self.copies.size == 1 or not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.copies.all_reduce(torch.cat([g.flatten() for g in gradients]), "expert gradients").wait()
        for parameter, part in zip(parameters, total.split([g.numel() for g in gradients])):
            parameter.grad = part.view_as(parameter)


class Travel:
    """`Dispatch` over a group: rows go to the ranks that hold their experts, and come back."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def __call__(self, rows: Tensor, sizes: Sequence[int], experts: Experts) -> Tensor:
        comm = self.comm
        held = len(sizes) // comm.size  # e
        blocks = torch.tensor(sizes, device=rows.device).split(held)
        counts = recompute.keep(lambda: torch.stack(comm.all_to_all(blocks, [(held,)] * comm.size, "expert counts").wait()))
        table: list[list[int]] = counts.tolist()  # [P, e]: from each rank, for each of the experts held here
        send = [sum(sizes[start : start + held]) for start in range(0, len(sizes), held)]
        receive = [sum(row) for row in table]
        arrived = exchange_rows(rows, send, receive, comm, "experts")  # by rank, then expert
        pieces = arrived.split([count for row in table for count in row])
        by_expert = [pieces[rank * held + expert] for expert in range(held) for rank in range(comm.size)]
        outputs = experts(torch.cat(by_expert), [sum(row[expert] for row in table) for expert in range(held)])
        pieces = outputs.split([len(piece) for piece in by_expert])
        by_rank = [pieces[expert * comm.size + rank] for rank in range(comm.size) for expert in range(held)]
        return exchange_rows(torch.cat(by_rank), receive, send, comm, "experts back")
