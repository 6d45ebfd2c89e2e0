"""Initial values for what a process keeps of a model, made part by part.

The model is laid out without memory (torch's meta device) and divided first: layers, heads, vocabulary, experts. Then its parts
are made whole, one after the other, in the order in which a whole model draws its numbers. What is kept of a part is cut as the
part was, just before data parallelism shards it, and the rest is forgotten. So a process never holds more than its share and one
whole part, and what it holds is, to the last bit, what one process makes of the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from longhaul.models.heads import Kept
from longhaul.models.lm import LanguageModel


class Initialiser:
    """Gives parts of a model, in place, their initial values. A model that has memory is left as it is.

    Args:
        model: divided, but not sharded.
        cuts: how a parameter or buffer of a name was cut, in order.
        device: where values shall lie.
        seed: of the values, as in `torch.manual_seed`.
    """

    def __init__(self, model: LanguageModel, cuts: Callable[[str], Sequence[Kept]], device: torch.device, seed: int) -> None:
        self.model, self.cuts, self.device = model, cuts, device
        self._empty = any(parameter.is_meta for parameter in model.parameters())
        self._state = torch.Generator().manual_seed(seed).get_state()
        self._order: list[str] | None = None  # of parts still to be drawn

    def __call__(self, module: nn.Module) -> None:
        """Fill a block, all those before it being filled already; or, given the model itself, all that is left."""
        if not self._empty:
            return
        if self._order is None:
            self._order = self._begin()
        last = next((f"layers.{number}" for number, layer in self.model.layers.numbered() if layer is module), self._order[-1])
        while last in self._order:
            self._draw(self._order.pop(0))

    def _begin(self) -> list[str]:
        """What a whole model draws while it is made, which nobody keeps."""
        order = self.model.initial_order()
        with self._drawing(), torch.device("cpu"):
            for name in ("embedding", *(name for name in order if name.startswith("layers."))):
                self.model.fresh(name)
        return order

    def _draw(self, name: str) -> None:
        """The next part. Where it is not here, or is here as another's twin, its numbers are passed over."""
        with torch.device("meta"):
            whole = self.model.fresh(name).to_empty(device="cpu")
        with self._drawing():
            self.model.initialise(whole)
        made: dict[int, Tensor] = {}
        for here in (name, "head") if name == "embedding" and self.model.config.tie_embeddings else (name,):
            self._fill(here, whole, made)

    def _fill(self, name: str, whole: nn.Module, made: dict[int, Tensor]) -> None:
        """What is kept of a part, in the place of what is empty here; `made` is what was made, by the identity of that."""
        part: nn.Module | None = self.model
        for step in name.split("."):
            part = None if part is None else part._modules.get(step)
        if part is None:  # of another stage of layers
            return
        for leaf, tensor in [*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False)]:
            if id(tensor) not in made:
                value = whole.get_parameter(leaf) if isinstance(tensor, nn.Parameter) else whole.get_buffer(leaf)
                value = value.detach()
                for kept in self.cuts(f"{name}.{leaf}"):
                    value = kept.of(value)
                made[id(tensor)] = _like(tensor, value.to(self.device))
            holder, _, own = leaf.rpartition(".")
            setattr(part.get_submodule(holder), own, made[id(tensor)])

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """The CPU's generator goes on with this model's numbers; then it is as it was."""
        generator = torch.default_generator
        before = generator.get_state()
        generator.set_state(self._state)
        try:
            yield
        finally:
            self._state = generator.get_state()
            generator.set_state(before)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """The value as a parameter with the attributes of the one that it replaces, or as a buffer."""
    if not isinstance(tensor, nn.Parameter):
        return value
    made = nn.Parameter(value, requires_grad=tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    return made
