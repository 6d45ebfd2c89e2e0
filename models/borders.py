"""Where the states at the borders of a stream's chunks wait until their chunk is replayed.

A stack: borders are pushed in the order of time and popped from the last to the first. A state is kept as a copy of its
own, since what a layer hands on may be a view of a whole chunk's activations.

Keys and values of softmax attention grow by a chunk at every border. Those that the border before holds already are not
kept again: a border keeps its new rows, and a state is put together when it is taken. So they cost one copy of the
stream's keys and values, not one a border.

States of a fixed size have their places in one tensor for all borders. A small tensor of its own for each, made between the
large ones of a forward, would pin the allocator's freed memory down: 0.8 MB a border were seen for states of 32 KB.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .sequence import KVState

KEEP = ("all", "two_level", "cpu", "disk")


class _Leaf(NamedTuple):
    """Tensors of one leaf of a state (two of a `KVState`, none of None).

    Attributes:
        rows: of the whole state, of a `KVState`.
        grown: the first rows are those of the border below on the stack, and only the others are here.
    """

    tensors: tuple[Tensor, ...]
    device: torch.device | None
    rows: int = 0
    grown: bool = False


class _Border(NamedTuple):
    chunk: int
    token: int
    spec: TreeSpec
    leaves: list[_Leaf]
    file: Path | None
    elements: int


class Borders:
    """A stack of states.

    Args:
        keep: one of `KEEP`: tensors stay on their device (`all`, `two_level`), go to the CPU, or to files.
        capacity: borders that are held at one time; more are possible, each in tensors of its own.
        folder: in which `disk` makes a temporary folder of its own, gone at the end.

    Attributes:
        peak: the most elements that were held at one time.
    """

    def __init__(self, keep: str = "all", folder: Path | None = None, capacity: int = 1) -> None:
        assert keep in KEEP, keep
        self.keep, self.peak, self.capacity = keep, 0, capacity
        self._places: dict[int, Tensor] = {}  # [capacity, *shape], by the leaf's position in a state
        self._stack: list[_Border] = []
        self._temporary = tempfile.TemporaryDirectory(prefix="longhaul-borders-", dir=folder) if keep == "disk" else None

    def __enter__(self) -> Borders:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.clear()
        if self._temporary is not None:
            self._temporary.cleanup()

    @property
    def index(self) -> int:
        """Of the newest border."""
        return self._stack[-1].chunk

    @property
    def elements(self) -> int:
        """Held now, wherever."""
        return sum(border.elements for border in self._stack)

    @torch.no_grad()
    def push(self, index: int, token: int, state: Any) -> None:
        """Keep the state before token `token` of the stream, which starts chunk `index`."""
        nodes, spec = tree_flatten(state, is_leaf=lambda node: isinstance(node, KVState))
        below = self._stack[-1] if self._stack else None
        same = below is not None and below.spec == spec
        leaves = []
        for position, node in enumerate(nodes):
            if isinstance(node, KVState):
                rows = node.k.shape[0]
                before = below.leaves[position].rows if below is not None and same else 0
                # A state that grew by all tokens since the border below has dropped nothing and is of the same document.
                grown = before > 0 and below is not None and rows == before + token - below.token
                first = before if grown else 0
                leaves.append(_Leaf(self._put(node.k[first:], node.v[first:]), node.k.device, rows, grown))
            elif isinstance(node, Tensor):
                leaves.append(_Leaf((self._place(position, node),), node.device))
            else:
                assert node is None, f"a state holds {type(node).__name__}, not tensors alone"
                leaves.append(_Leaf((), None))
        elements = sum(tensor.numel() for leaf in leaves for tensor in leaf.tensors)
        file = None
        if self._temporary is not None:
            file = Path(self._temporary.name) / f"{index}.pt"
            torch.save([list(leaf.tensors) for leaf in leaves], file)
            leaves = [leaf._replace(tensors=()) for leaf in leaves]
        self._stack.append(_Border(index, token, spec, leaves, file, elements))
        self.peak = max(self.peak, self.elements)

    def _put(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        away = torch.device("cpu") if self.keep in ("cpu", "disk") else None
        return tuple(tensor.new_empty(tensor.shape, device=away or tensor.device).copy_(tensor) for tensor in tensors)

    def _place(self, position: int, tensor: Tensor) -> Tensor:
        """A copy of a leaf of a fixed size, in the place of the next border."""
        places = self._places.get(position)
        if places is None:
            away = torch.device("cpu") if self.keep in ("cpu", "disk") else tensor.device
            rows = 1 if self.keep == "disk" else self.capacity
            places = self._places[position] = tensor.new_empty(rows, *tensor.shape, device=away)
        row = 0 if self.keep == "disk" else len(self._stack)
        if row >= len(places) or places.shape[1:] != tensor.shape or places.dtype != tensor.dtype:
            return self._put(tensor)[0]
        return places[row].copy_(tensor)

    def top(self) -> Any:
        """The newest state."""
        border = self._stack[-1]
        pieces = [[tensors] if tensors else [] for tensors in _read(border)]
        depth = len(self._stack) - 1
        growing = [position for position, leaf in enumerate(border.leaves) if leaf.grown]
        while growing:
            depth -= 1
            found = _read(self._stack[depth])
            for position in growing:
                pieces[position].append(found[position])
            growing = [position for position in growing if self._stack[depth].leaves[position].grown]
        nodes = []
        for leaf, parts in zip(border.leaves, pieces):
            whole = [torch.cat(own[::-1]) if len(own) > 1 else own[0] for own in zip(*parts)]
            whole = [tensor.to(leaf.device) for tensor in whole]
            nodes.append(KVState(*whole) if len(whole) == 2 else whole[0] if whole else None)
        return tree_unflatten(nodes, border.spec)

    def pop(self) -> Any:
        """The newest state, which is held no more."""
        state = self.top()
        border = self._stack.pop()
        if border.file is not None:
            border.file.unlink()
        return state


def _read(border: _Border) -> list[tuple[Tensor, ...]]:
    """The tensors of each leaf."""
    if border.file is None:
        return [leaf.tensors for leaf in border.leaves]
    return [tuple(tensors) for tensors in torch.load(border.file, weights_only=True)]
