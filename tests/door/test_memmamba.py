"""MemMamba on ranks and in one process: exact, causal, isolated, the same by chunks and by single tokens.

Which notes are kept follows from scores, so ranks may only differ where two scores, or a score and the threshold, are closer
than rounding: a margin is asserted.
"""

import dataclasses
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longhaul.launcher.verify.exactness import compare, make_problem, run, tensors
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers import memmamba
from longhaul.models.mixers.mamba1 import Mamba1Config
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.mixers.memmamba import MemMamba, MemMambaConfig
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout
from tests.harness.cases import document_tables, rank_lengths
from tests.harness.numerics import TOLERANCE, assert_bitwise_equal, assert_close, assert_trees_close
from tests.harness.pool import run_ranks

from .ranks import every_third, make_shard, remembering

WIDTH = 8
CONFIG = ModelConfig(
    vocab_size=20,
    hidden_size=WIDTH,
    num_layers=4,
    num_heads=2,
    pattern="LLNL",
    tie_embeddings=False,
    linear_mixer="memmamba",
    mamba1=Mamba1Config(state_size=3, chunk=8),
    mamba2=Mamba2Config(state_size=3, head_dim=8, chunk=8),
    memmamba=MemMambaConfig(summary_width=4, slots=3, block=4, period=2),
)
VARIANTS = {
    "priority": CONFIG.memmamba,
    "fifo": dataclasses.replace(CONFIG.memmamba, replacement="fifo"),
    "mamba2": dataclasses.replace(CONFIG.memmamba, core="mamba2", period=3, threshold=0.0),
}
BOUNDS = (0, 3, 5, 33, 34, 60)


def make_model(variant: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """Reads vectors instead of tokens; the second and the last layer, or the last, read earlier layers' pools."""
    torch.manual_seed(0)
    model = LanguageModel(dataclasses.replace(CONFIG, memmamba=VARIANTS[variant]))
    model.embedding = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        for block in model.layers:
            if isinstance(block.mixer, MemMamba):  # no unit of the scorer dead, about half of the tokens noted
                block.mixer.score_hidden.bias.fill_(1)
                block.mixer.score_out.bias.copy_(-block.mixer.score_out.weight.sum(1))
    return remembering(model.to(dtype))  # type: ignore[return-value]


class Scores:
    """The scores of every call, to see how close a choice was."""

    def __init__(self) -> None:
        self.margin = float("inf")
        self.noted = self.tokens = 0

    def make_notes(self, summary: Tensor, score: Tensor, positions: Tensor, noted: Tensor) -> Tensor:
        gaps = torch.cat([score.detach().sort().values.diff(), (score.detach() - 0.5).abs()])
        self.margin = min([self.margin, *gaps.tolist()])
        self.noted, self.tokens = self.noted + int(noted.sum()), self.tokens + len(noted)
        return memmamba_make_notes(summary, score, positions, noted)


memmamba_make_notes = memmamba.make_notes


def exactness(rank: int, world_size: int, variant: str, num_tokens: int, dtype: torch.dtype) -> dict[str, tuple[float, str]]:
    """The worst error of every tensor over tables and layouts, with where it was."""
    comm, worst, scores = Comm(dist.group.WORLD), {}, Scores()
    model = make_model(variant, dtype)
    takes = every_third(world_size)
    for table, first_position, keep_state in (
        ("one", 5, True), ("many_short", 0, False), ("spanning", 9, True), ("mixed", 0, True)
    ):  # fmt: skip
        documents = Documents(document_tables(num_tokens)[table], first_position)
        problem = make_problem(model, documents, WIDTH, 1, dtype, keep_state)
        with mock.patch.object(memmamba, "make_notes", scores.make_notes):
            run(model, WholeSequence(documents, keep_state=keep_state), problem, [(0, num_tokens)])
        for name, lengths in rank_lengths(num_tokens, world_size).items():
            if not takes():
                continue
            layout = SequenceLayout.contiguous(num_tokens, world_size, lengths)
            errors = compare(model, functools.partial(make_shard, comm), layout, problem, comm)
            for tensor, value in errors.items():
                if not value <= worst.get(tensor, (-1.0,))[0]:
                    worst[tensor] = (value, f"documents {table} from {first_position}, {name}, state {keep_state}")
    if variant != "fifo":
        assert scores.margin > 100 * torch.finfo(dtype).eps, f"a choice was as close as rounding: {scores.margin}"
    assert 0.2 * scores.tokens < scores.noted, "too few notes to prove anything"
    return worst


@pytest.mark.parametrize("variant, world_size", [*(("priority", ranks) for ranks in (1, 2, 3, 4)), ("fifo", 3), ("mamba2", 3)])
def test_ranks_equal_one_process(variant: str, world_size: int) -> None:
    dtype = torch.float64
    results = run_ranks(exactness, world_size, variant=variant, num_tokens=37, dtype=dtype, timeout=120)
    for rank, worst in enumerate(results):
        for needed in ("output", "final state 0", "state gradient 0", "gradient of layers.0.mixer.score_hidden.weight"):
            assert needed in worst
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[dtype], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


def test_single_precision() -> None:
    dtype = torch.float32
    for rank, worst in enumerate(run_ranks(exactness, 3, variant="priority", num_tokens=37, dtype=dtype, timeout=120)):
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[dtype], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(60, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_a_later_one(variant: str, training: bool, x: Tensor) -> None:
    model, shard = make_model(variant).train(training), WholeSequence(Documents((0, 60)))
    before, _ = model(x, shard)
    for edited in (1, 31, 59):
        changed = x.clone()
        changed[edited] += 1
        after, _ = model(changed, shard)
        assert_bitwise_equal(after[:edited], before[:edited], f"outputs before token {edited}")
        assert (after[edited:] != before[edited:]).any(1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_document_equals_itself_alone(variant: str, x: Tensor) -> None:
    model = make_model(variant)
    x.requires_grad_()
    packed, _ = model(x, WholeSequence(Documents(BOUNDS)))
    for start, stop in zip(BOUNDS, BOUNDS[1:]):
        alone, _ = model(x[start:stop], WholeSequence(Documents((0, stop - start))))
        assert_close(packed[start:stop], alone, f"document {start}..{stop}")
    (gradient,) = torch.autograd.grad(packed[5:33].square().sum(), x)
    assert gradient[:5].abs().max() == 0 and gradient[33:].abs().max() == 0 and gradient[5:33].abs().min() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_and_single_tokens_equal_the_whole(variant: str, x: Tensor) -> None:
    model, whole = make_model(variant), Documents(BOUNDS)
    with torch.no_grad():
        reference, final = model(x, WholeSequence(whole, keep_state=True))
        for cuts in ((0, 20, 20, 41, 60), tuple(range(61))):
            outputs, state = [], None
            for start, stop in zip(cuts, cuts[1:]):
                inside = [bound - start for bound in BOUNDS if start < bound < stop]
                bounds = (0, *inside, stop - start) if stop > start else (0,)
                documents = Documents(bounds, first_position=whole.position(start))
                hidden, state = model(x[start:stop], WholeSequence(documents, keep_state=True), state)
                outputs.append(hidden)
            assert_close(torch.cat(outputs), reference, "outputs")
            assert_trees_close(state, final, "state")
    assert sum(tensor[0].any(-1).sum() for tensor in tensors([final[0].pool])) == CONFIG.memmamba.slots


def test_recomputed_gradients_are_the_same(x: Tensor) -> None:
    model, gradients = make_model("priority"), []
    for mode in ("none", "full"):
        model.activation_checkpointing = mode
        model.zero_grad()
        model(x, WholeSequence(Documents(BOUNDS)))[0].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    for name, gradient in gradients[0].items():
        assert_bitwise_equal(gradients[1][name], gradient, name)
        assert gradient.abs().max() > 0, f"nothing reaches {name}"


def test_a_pool_carries_a_token_through_a_state_that_forgets(x: Tensor) -> None:
    """A note of the first block is read where Mamba's own state has forgotten it."""
    model = make_model("priority")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(12)  # the state forgets within a token
            if name.endswith("score_out.bias"):
                parameter.fill_(10)
    mixer = model.layers[0].mixer

    def reaching(module: nn.Module) -> int:
        """Tokens before the 36th that later ones, from the 40th on, depend on."""
        leaf = x.detach().requires_grad_()
        y = module(leaf, WholeSequence(Documents((0, 60))))[0][40:].square().sum()
        return int((torch.autograd.grad(y, leaf)[0][:36].abs().amax(1) > 1e-9).sum())

    assert reaching(mixer.core) == 0
    assert 0 < reaching(mixer) <= 5 * CONFIG.memmamba.slots  # the pools of 5 blocks


@pytest.mark.parametrize(
    "options, named",
    [
        ({"core": "mamba9"}, "mamba9"),
        ({"replacement": "lifo"}, "lifo"),
        ({"slots": 0}, "slots"),
        ({"threshold": 1.0}, r"1\.0"),
        ({"period": -1}, "-1"),
    ],
)
def test_nonsense_is_refused_with_its_value(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        MemMambaConfig(**options)


def test_which_layers_read_earlier_layers() -> None:
    def readers(**changes: object) -> list[bool]:
        config = dataclasses.replace(CONFIG, num_layers=8, **changes)
        return [getattr(block.mixer, "layer_reader", None) is not None for block in LanguageModel(config).layers]

    assert readers(pattern="L") == [False, True] * 4
    assert readers(pattern="LNLL") == [False, False, True, False, True, False, False, True]
    assert not any(readers(memmamba=dataclasses.replace(CONFIG.memmamba, period=0)))
    first = readers(pattern="L", memmamba=dataclasses.replace(CONFIG.memmamba, period=1))
    assert first == [False] + [True] * 7
