"""Mixers inside a megatron-core stack: over tensor and context ranks, every output and gradient is that of one rank."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longhaul.launcher.verify.subjects import config as model_config
from longhaul.models.errors import UserError
from longhaul.models.ops.segments import Documents
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.megatron import mixer_spec
from tests.harness.numerics import assert_close
from tests.harness.pool import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed: pip install 'longhaul[megatron]'"
)
LENGTH, ROWS, VOCABULARY = 16, 2, 24
PACKED = (0, 4, 12, 32)
DOC = Path(__file__).parents[2] / "docs" / "megatron.md"


class Block(nn.Module):
    """A mixer and Megatron's feed-forward layer, in a residual stream."""

    def __init__(self, config: Any, spec: Any, layer: int) -> None:
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.spec_utils import build_module

        super().__init__()
        self.mixer = build_module(spec, config=config, layer_number=layer)
        options = {"config": config, "init_method": config.init_method, "bias": True, "skip_bias_add": False}
        self.up = ColumnParallelLinear(16, 32, gather_output=False, **options)
        self.down = RowParallelLinear(32, 16, input_is_parallel=True, **options)

    def forward(self, x: Tensor, packed: Any) -> Tensor:
        y, _ = self.mixer(x, attention_mask=None, packed_seq_params=packed)
        x = x + y
        return x + self.down(torch.tanh(self.up(x)[0]))[0]


def stack_gradients(
    rank: int, world_size: int, mixer: str, tensor: int, layout: str, packed: bool, change: int | None = None, groups: int = 2
) -> dict[str, Any]:
    """Losses of the tokens held here with their places, and gradients, summed over context ranks, with their cuts."""
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding

    context = world_size // tensor
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, context_parallel_size=context)
    try:
        config: Any = ModelParallelConfig(tensor_model_parallel_size=tensor, use_cpu_initialization=True)
        config.hidden_size, config.num_layers, config.init_method = 16, 2, lambda w: nn.init.normal_(w, std=0.3)
        torch.manual_seed(1)
        options = model_config()
        spec = mixer_spec(replace(options, mamba2=replace(options.mamba2, num_groups=groups)), mixer, layout=layout)
        embedding = VocabParallelEmbedding(VOCABULARY, 16, init_method=config.init_method, config=config)
        blocks = nn.ModuleList([Block(config, spec, layer) for layer in (1, 2)])
        head = ColumnParallelLinear(16, VOCABULARY, config=config, init_method=config.init_method, bias=False)
        stack = nn.ModuleDict({"embedding": embedding, "blocks": blocks, "head": head})
        generator = torch.Generator().manual_seed(3)
        tokens, labels = torch.randint(VOCABULARY, (2, ROWS * LENGTH), generator=generator)
        if change is not None:
            tokens[change] = (tokens[change] + 1) % VOCABULARY
        rows = PACKED if packed else range(0, ROWS * LENGTH + 1, LENGTH)
        ranges = SequenceLayout.make(f"{layout}_per_document", Documents(tuple(rows)), context).parts
        mine = ranges[parallel_state.get_context_parallel_rank()]
        index = torch.cat([torch.arange(a, b) for a, b in mine])
        shape = (1 if packed else ROWS, -1)
        bounds = SimpleNamespace(cu_seqlens_q=torch.tensor(PACKED), cu_seqlens_q_padded=None) if packed else None
        x = embedding(tokens[index].view(shape)).transpose(0, 1)
        for block in blocks:
            x = block(x, bounds)
        logits, _ = head(x.contiguous())
        losses = vocab_parallel_cross_entropy(logits, labels[index].view(shape).t().contiguous())
        losses.sum().backward()
        comm, gradients = Comm(parallel_state.get_context_parallel_group()), {}
        for name, parameter in stack.named_parameters():
            assert parameter.grad is not None, name
            own = name.partition(".mixer.mixer.")
            kept = None
            if own[1]:
                kept = stack.get_submodule(own[0]).mixer.kept.get(own[2])
                assert parameter.tensor_model_parallel == (kept is not None)
            ranges_of = None
            if kept is not None:
                ranges_of = (kept.axis, [(held.start, held.stop) for held in kept.ranges])
            elif getattr(parameter, "tensor_model_parallel", False) and tensor > 1:
                part, axis = parallel_state.get_tensor_model_parallel_rank(), parameter.partition_dim
                size = parameter.shape[axis]
                ranges_of = (axis, [(part * size, (part + 1) * size)])
            gradients[name] = (ranges_of, comm.all_reduce(parameter.grad, "test").wait())
        return {"index": index, "losses": losses.t().flatten(), "gradients": gradients}
    finally:
        parallel_state.destroy_model_parallel()


RANKS = ((2, 2, "contiguous", False, 2), (2, 1, "zigzag", False, 2), (4, 2, "zigzag", True, 2), (4, 2, "contiguous", False, 2))
CASES = [(mixer, *ranks) for mixer in ("mamba2", "gated_deltanet", "attention") for ranks in RANKS]
CASES += [("mamba2", 4, 2, "zigzag", False, 1)]  # one group: B and C are shared by the tensor ranks


@pytest.mark.parametrize("mixer, world, tensor, layout, packed, groups", CASES)
def test_every_rank_has_the_gradients_of_one(
    mixer: str, world: int, tensor: int, layout: str, packed: bool, groups: int
) -> None:
    arguments = {"mixer": mixer, "layout": layout, "packed": packed, "groups": groups}
    (whole,) = run_ranks(stack_gradients, 1, tensor=1, **arguments)
    for rank, found in enumerate(run_ranks(stack_gradients, world, tensor=tensor, **arguments)):
        assert_close(found["losses"], whole["losses"][found["index"]], f"losses, rank {rank}")
        assert found["gradients"].keys() == whole["gradients"].keys()
        for name, (cut, gradient) in found["gradients"].items():
            reference = whole["gradients"][name][1]
            if cut is not None:
                axis, ranges = cut
                reference = torch.cat([reference.narrow(axis, a, b - a) for a, b in ranges], dim=axis)
            assert_close(gradient, reference, f"gradient of {name}, rank {rank}")


@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet", "attention"])
def test_a_token_changes_only_what_follows_in_its_document(mixer: str) -> None:
    def losses(change: int | None) -> Tensor:
        found = torch.zeros(ROWS * LENGTH)
        arguments: dict[str, Any] = {"mixer": mixer, "tensor": 2, "layout": "zigzag", "packed": True, "change": change}
        for rank in run_ranks(stack_gradients, 4, **arguments):
            found[rank["index"]] = rank["losses"]
        return found

    differs = (losses(6) - losses(None)).abs() > 0
    assert not differs[:6].any(), "an earlier token saw a later one"
    assert not differs[12:].any(), "another document saw it"
    assert differs[6:12].any() and differs[9:12].any(), "no later token saw it"


def from_the_document(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import get_batch_on_this_cp_rank

    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    try:
        config = TransformerConfig(
            num_layers=2, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True, context_parallel_size=world_size
        )
        found = re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
        assert found is not None
        names: dict[str, Any] = {"config": config}
        exec(found[1], names)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(ROWS, LENGTH, 16, generator=generator)
        runs = torch.arange(LENGTH).chunk(2 * world_size)
        places = torch.cat([runs[rank], runs[2 * world_size - 1 - rank]])
        mine = get_batch_on_this_cp_rank({"x": x})["x"]
        assert torch.equal(mine, x[:, places])
        return places, names["mixer"](mine.transpose(0, 1))[0]
    finally:
        parallel_state.destroy_model_parallel()


def test_the_text_of_the_document_runs() -> None:
    ((_, whole),) = run_ranks(from_the_document, 1)
    for rank, (places, found) in enumerate(run_ranks(from_the_document, 2)):
        assert_close(found, whole[places], f"output, rank {rank}")


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="layout 'striped' is no order"):
        mixer_spec(model_config(), layout="striped")
    with pytest.raises(UserError, match="mixer 'mamba3' is none of"):
        mixer_spec(model_config(), "mamba3")
