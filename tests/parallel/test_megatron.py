"""Mixers inside megatron-core models, unpatched: over tensor and context ranks every loss and gradient is that of one rank."""

import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from longhaul.launcher.verify.subjects import config as model_config
from longhaul.models.errors import UserError
from longhaul.models.heads import Narrowable
from longhaul.models.mixers.registry import MIXERS
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.megatron import mixer_spec
from tests.harness.numerics import assert_close
from tests.harness.pool import run_ranks
from tests.parallel.megatron_model import LENGTH, ROWS, VOCABULARY, WIDTH, Part, gpt_model, parts, transformer_config

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed: pip install 'longhaul[megatron]'"
)
RANKS = 4
PACKED = (0, 4, 12, 32)
DOC = Path(__file__).parents[2] / "docs" / "megatron.md"
SERVED = [name for name in MIXERS if name not in ("memmamba", "mom")]


class Whole(nn.Module):
    """A mixer whose channels do not divide among heads: no `cuts`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH))

    @classmethod
    def build(cls, config: Any, layer: int) -> "Whole":
        return cls()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.3)

    def forward(self, x: Tensor, shard: SequenceShard, state: Any = None) -> tuple[Tensor, Any]:
        before, _ = shard.halo(x, 1)
        assert shard.segments.num_parts == before.shape[0]
        return torch.tanh(x @ self.weight), ()


class Case(NamedTuple):
    mixers: tuple[str, ...]
    tensor: int = 1
    context: int = 1
    layout: str = "contiguous"
    packed: bool = False
    groups: int = 2  # of Mamba-2: with one, tensor ranks share rows of B and C
    change: int | None = None  # a token that is another
    alone: bool = False  # the mixers, in float64, without the model around them
    sequence_parallel: bool = False  # alone only: Megatron's own mappings ask for a CUDA device

    @property
    def reference(self) -> "Case":
        return Case(self.mixers, packed=self.packed, groups=self.groups, alone=self.alone)


HYBRID = ("mamba2", "gated_deltanet", "attention")
GRADIENTS = [
    Case(HYBRID, tensor=2),
    Case(HYBRID, context=2, layout="zigzag"),
    Case(HYBRID, tensor=2, context=2),
    Case(HYBRID, tensor=2, context=2, layout="zigzag", packed=True),
    Case(("mamba2",), tensor=2, context=2, layout="zigzag", groups=1),
    Case(HYBRID, tensor=2, alone=True, sequence_parallel=True),
    *(Case((mixer,), tensor=2, context=2, layout="zigzag", alone=True) for mixer in (*SERVED, "whole")),
    *(Case((mixer,), tensor=2, context=2, alone=True, sequence_parallel=True) for mixer in (*SERVED, "whole")),
]
CHANGES = [Case(HYBRID, tensor=2, context=2, layout="zigzag", packed=True, change=change) for change in (None, 6)]


@contextmanager
def division(tensor: int, context: int) -> Iterator[None]:
    """Megatron's groups; what is left of the ranks is data parallel, and alike."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, context_parallel_size=context)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def config_of(case: Case) -> Any:
    dtype = torch.float64 if case.alone else torch.float32
    return transformer_config(case.mixers, case.tensor, case.context, case.sequence_parallel, params_dtype=dtype)


def held_tokens(case: Case) -> Tensor:
    """Places, in the whole stream, of the tokens of this context rank: [rows, tokens of a row]."""
    from megatron.core import parallel_state

    bounds = PACKED if case.packed else range(0, ROWS * LENGTH + 1, LENGTH)
    layout = SequenceLayout.make(f"{case.layout}_per_document", Documents(tuple(bounds)), case.context)
    mine = layout.parts[parallel_state.get_context_parallel_rank()]
    return torch.cat([torch.arange(start, stop) for start, stop in mine]).view(1 if case.packed else ROWS, -1)


def gradients(module: nn.Module) -> list[tuple[Part, Tensor]]:
    """Of all parameters, summed over context ranks as Megatron's DDP does."""
    from megatron.core import parallel_state

    comm, held, found = Comm(parallel_state.get_context_parallel_group()), parts(module), []
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found.append((held[name], comm.all_reduce(parameter.grad, "test").wait()))
    return found


def of_the_model(case: Case) -> dict[str, Any]:
    from megatron.core.packed_seq_params import PackedSeqParams

    model = gpt_model(config_of(case), case.mixers, case.layout, case.groups)
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(VOCABULARY, (2, ROWS * LENGTH), generator=generator)
    if case.change is not None:
        tokens[case.change] = (tokens[case.change] + 1) % VOCABULARY
    places = held_tokens(case)
    bounds = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(PACKED)) if case.packed else None
    losses = model(tokens[places], None, None, labels=labels[places], packed_seq_params=bounds)
    losses.sum().backward()
    return {"places": places.flatten(), "outputs": losses.flatten(), "gradients": gradients(model)}


def of_the_mixers(case: Case) -> dict[str, Any]:
    """Mixers one after another: what comes out of x, and every gradient of a weighted sum of that."""
    from megatron.core import parallel_state
    from megatron.core.transformer.spec_utils import build_module

    config, rank = config_of(case), parallel_state.get_tensor_model_parallel_rank()
    mixers = nn.ModuleList()
    for number, mixer in enumerate(case.mixers, 1):
        mixers.append(build_module(mixer_spec(model_config(), mixer, layout=case.layout), config=config, layer_number=number))
    generator = torch.Generator().manual_seed(4)
    whole, weights = torch.randn(2, ROWS * LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    places = held_tokens(case).t()  # [s, b]
    if case.sequence_parallel:
        places = places.chunk(case.tensor)[rank]  # [s/t, b]
    x = whole[places].requires_grad_()
    y = x
    for module in mixers:
        y = y + module(y)[0]
    (y * weights[places]).sum().backward()
    assert x.grad is not None
    outputs = torch.stack([y.detach(), x.grad], dim=2).flatten(0, 1)
    return {"places": places.flatten(), "outputs": outputs, "gradients": gradients(mixers)}


class Results(NamedTuple):
    """What a rank found: Megatron is imported once, so everything is in one cell."""

    cases: dict[Case, dict[str, Any]]
    document: list[tuple[Tensor, Tensor]]
    refusals: dict[str, str]


def run_all(rank: int, world_size: int, cases: list[Case]) -> Results:
    found = {}
    warnings.filterwarnings("ignore", module=r"megatron\.")  # of what it lacks here, and of its own older arguments
    with mock.patch.dict(MIXERS, {"whole": Whole}):
        for tensor, context in sorted({(case.tensor, case.context) for case in cases}):
            with division(tensor, context):
                for case in cases:
                    if (case.tensor, case.context) == (tensor, context):
                        found[case] = of_the_mixers(case) if case.alone else of_the_model(case)
    return Results(found, from_the_document(), refusals())


@pytest.fixture(scope="module")
def results() -> list[Results]:
    """Of all ranks. What one process would find is computed on each of them, by itself."""
    cases = [*GRADIENTS, *CHANGES]
    return run_ranks(run_all, RANKS, cases=list(dict.fromkeys([*(case.reference for case in cases), *cases])))


def identity(case: Case) -> str:
    flags = [name for name in ("packed", "alone", "sequence_parallel") if getattr(case, name)]
    return "-".join(["+".join(case.mixers), f"tp{case.tensor}", f"cp{case.context}", case.layout, f"groups{case.groups}", *flags])


@needs_megatron
@pytest.mark.parametrize("case", GRADIENTS, ids=identity)
def test_every_rank_has_the_gradients_of_one(case: Case, results: list[Results]) -> None:
    whole = results[0].cases[case.reference]
    order = whole["places"].argsort()
    reference = {part.name: gradient for part, gradient in whole["gradients"]}
    for rank, found in enumerate(each.cases[case] for each in results):
        assert_close(found["outputs"], whole["outputs"][order][found["places"]], f"outputs, rank {rank}")
        assert {part.name for part, _ in found["gradients"]} == reference.keys()
        for part, gradient in found["gradients"]:
            assert_close(gradient, part.of(reference[part.name]), f"gradient of {part.name}, rank {rank}")


@pytest.mark.parametrize("mixer", SERVED)
def test_every_registered_mixer_is_cut_by_heads(mixer: str) -> None:
    assert isinstance(MIXERS[mixer].build(model_config(), 0), Narrowable)


@needs_megatron
def test_a_token_changes_only_what_follows_in_its_document(results: list[Results]) -> None:
    def losses(case: Case) -> Tensor:
        found = torch.full((ROWS * LENGTH,), torch.nan)
        for each in results:
            found[each.cases[case]["places"]] = each.cases[case]["outputs"]
        return found

    differs = (losses(CHANGES[1]) - losses(CHANGES[0])).abs() > 0
    assert not differs[:6].any(), "an earlier token saw a later one"
    assert not differs[12:].any(), "another document saw it"
    assert differs[6:12].any() and differs[9:12].any(), "no later token saw it"


def text_of_the_document() -> str:
    found = re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def from_the_document() -> list[tuple[Tensor, Tensor]]:
    """Losses of the tokens held here, with one context rank and with two."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    found = []
    for context in (1, 2):
        with division(1, context):
            names: dict[str, Any] = {"config": config_of(Case(("mamba2", "mamba2"), context=context))}
            names["config"].init_method = names["config"].output_layer_init_method = nn.init.normal_
            torch.manual_seed(0)
            exec(text_of_the_document(), names)
            tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
            batch = get_batch_on_this_cp_rank({"tokens": tokens, "places": torch.arange(tokens.numel()).view_as(tokens)})
            losses = names["gpt"](batch["tokens"], None, None, labels=batch["tokens"])
            found.append((batch["places"].flatten(), losses.flatten()))
    return found


@needs_megatron
def test_the_text_of_the_document_runs(results: list[Results]) -> None:
    text = text_of_the_document()
    assert len([line for line in text.splitlines() if line.strip()]) <= 10
    assert 'mixer_spec(model, mixer="mamba2", exchange="all_gather"' in text, "LASP-2 Mamba-2"
    seen = []
    for rank, ((_, whole), (places, found)) in enumerate(each.document for each in results):
        assert_close(found, whole[places], f"losses, rank {rank}")
        seen.append(places)
    assert torch.cat(seen).unique().numel() == ROWS * LENGTH


def refusals() -> dict[str, str]:
    """What is said where a mixer, or what it is given, cannot be served with two context ranks."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.spec_utils import build_module

    said = {}

    def note(name: str, mixer: str = "mamba2", given: Any = None, **changed: Any) -> None:
        config = config_of(Case((mixer,), context=2))
        for field, value in changed.items():
            setattr(config, field, value)
        try:
            module = build_module(mixer_spec(model_config(), mixer, layout="zigzag"), config=config, layer_number=1)
            given(module)
        except UserError as error:
            said[name] = str(error)

    x = torch.zeros(6, 1, WIDTH)
    with division(1, 2):
        note("width", hidden_size=WIDTH + 4)
        note("memory", "memmamba")
        note("mixture", "mom")
        note("inference", given=lambda module: module(x, inference_context=object()))
        note("checkpoint", given=lambda module: module.sharded_state_dict())
        note("uneven", given=lambda module: module(x[:5]))
        bounds = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 8]))
        note("bounds", given=lambda module: module(x, packed_seq_params=bounds))
    return said


@needs_megatron
def test_what_is_refused(results: list[Results]) -> None:
    with pytest.raises(UserError, match="layout 'striped' is no order"):
        mixer_spec(model_config(), layout="striped")
    with pytest.raises(UserError, match="mixer 'mamba3' is none of"):
        mixer_spec(model_config(), "mamba3")
    with pytest.raises(UserError, match="hierarchical needs groups inside and across nodes"):
        mixer_spec(model_config(), exchange="hierarchical")
    expected = {
        "width": "hidden_size is 16 here, but 20 for Megatron: make them equal.",
        "memory": "memmamba has notes for later layers, which a Megatron layer has no place for: use another mixer.",
        "mixture": "mom has an auxiliary loss, which a Megatron layer has no place for: use another mixer.",
        "inference": "Longhaul's mixers inside Megatron only train: load the weights into longhaul generate instead.",
        "checkpoint": "Megatron's distributed checkpoint does not know Longhaul's cuts: save state_dict() of each tensor rank.",
        "uneven": "With 2 context-parallel ranks a document's length must be a multiple of 4: pad it.",
        "bounds": "cu_seqlens end at 8, but 1 rows of 6 tokens on 2 context-parallel ranks hold 12: give one row, and the bounds "
        "of the whole of it.",
    }
    for each in results:
        assert each.refusals.keys() == expected.keys()
        for name, said in each.refusals.items():
            assert said.removesuffix(" when instantiating MegatronMixer") == expected[name]  # Megatron adds where


def test_without_megatron_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.partition(".")[0] == "megatron":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    with pytest.raises(UserError) as raised:
        mixer_spec(model_config())
    assert str(raised.value) == (
        "mixer_spec needs megatron-core, which cannot be imported (No module named 'megatron'): run "
        "pip install 'longhaul[megatron]'."
    )
