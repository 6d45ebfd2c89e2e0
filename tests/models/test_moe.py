"""The mixture of experts: against a token-by-token oracle, in any packing, on ranks."""

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.ffn import SwiGLU
from longhaul.models.lm import LanguageModel, LossOutput
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.moe import MoE, MoEConfig
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import SequenceShard, WholeSequence
from longhaul.parallel.comm import Comm
from longhaul.parallel.layout import SequenceLayout
from tests.door.ranks import make_shard
from tests.harness.cases import document_tables, rank_lengths
from tests.harness.numerics import TOLERANCE, assert_bitwise_equal, assert_close
from tests.harness.pool import run_ranks

WIDTH, FFN, BOUNDS = 8, 12, (0, 3, 4, 33, 34, 60)
FULL = MoEConfig(num_experts=5, top_k=2, shared_hidden_size=6, balance_weight=0.5, z_weight=0.1)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layer_of(config: MoEConfig = FULL) -> MoE:
    torch.manual_seed(0)
    layer = MoE(WIDTH, FFN, config, initializer_range=0.5).double()
    layer.reset_parameters()
    return layer


def oracle(layer: MoE, x: Tensor, bounds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One token and one document at a time."""
    config, outputs = layer.config, []
    p = torch.stack([(layer.router @ token).softmax(0) for token in x])
    best = p.sort(dim=1, descending=True).values
    assert (best[:, config.top_k - 1] - best[:, config.top_k]).min() > 1e-6, "a tie would make the test vacuous"
    chosen = [token.argsort(descending=True)[: config.top_k].tolist() for token in p]
    for token, own, scores in zip(x, chosen, p):
        y = sum(
            scores[e] / scores[own].sum() * (layer.experts.down[e] @ swiglu(layer.experts.gate_up[e] @ token)) for e in own
        )
        outputs.append(y if layer.shared is None else y + layer.shared(token))
    aux = []
    for start, stop in zip(bounds, bounds[1:]):
        f = torch.zeros(config.num_experts)
        for own in chosen[start:stop]:
            f[own] += 1 / (config.top_k * (stop - start))
        balance = config.num_experts * (f * p[start:stop].mean(0)).sum()
        z = torch.stack([(layer.router @ token).logsumexp(0) ** 2 for token in x[start:stop]]).mean()
        aux.append(config.balance_weight * balance + config.z_weight * z)
    return torch.stack(outputs), torch.stack(aux)


def swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2)
    return nn.functional.silu(gate) * up


@pytest.mark.parametrize("k", (1, 2, 4))
def test_layer_equals_tokens(k: int, generator: torch.Generator) -> None:
    layer = layer_of(dataclasses.replace(FULL, top_k=k))
    x = torch.randn(60, WIDTH, generator=generator).requires_grad_()
    dy, daux = torch.randn(60, WIDTH, generator=generator), torch.randn(5, generator=generator)
    found = layer(x, WholeSequence(Documents(BOUNDS)))
    expected = oracle(layer, x, BOUNDS)
    leaves = {"x": x, **dict(layer.named_parameters())}
    for name, a, b in zip(("y", "aux"), found, expected):
        assert_close(a, b, name)
    gradients = [torch.autograd.grad(result, leaves.values(), (dy, daux)) for result in (found, expected)]
    for name, a, b in zip(leaves, *gradients):
        assert_close(a, b, f"gradient of {name}")


def test_equal_use_costs_one_and_a_favourite_more(generator: torch.Generator) -> None:
    config = MoEConfig(num_experts=4, top_k=1, balance_weight=1.0)
    layer, shard = layer_of(config), WholeSequence(Documents((0, 40)))
    x = torch.eye(4, WIDTH).repeat(10, 1)
    with torch.no_grad():
        layer.router.zero_()
        layer.router[:4, :4] = 20 * torch.eye(4)  # token i goes to expert i mod 4
        assert_close(layer(x, shard)[1], torch.ones(1), "all experts alike", tolerance=1e-6)
        layer.router[1:].zero_()
        layer.router[0] = 20.0
        assert_close(layer(x, shard)[1], torch.full((1,), 4.0), "one expert for all", tolerance=1e-6)


def test_descending_the_balance_loss_spreads_the_tokens(generator: torch.Generator) -> None:
    layer, shard = layer_of(MoEConfig(num_experts=4, top_k=1, balance_weight=1.0)), WholeSequence(Documents((0, 200)))
    x = torch.randn(200, WIDTH, generator=generator) + 1.0
    with torch.no_grad():
        layer.router[0] += 1.0  # a favourite

    def share_of_favourite() -> float:
        return ((x @ layer.router.T).argmax(1) == 0).double().mean().item()

    before = share_of_favourite()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(layer(x, shard)[1].sum(), layer.router)
        with torch.no_grad():
            layer.router -= 0.3 * gradient
    assert before > 0.9 and share_of_favourite() < 0.5


def test_nothing_to_weigh_means_no_auxiliary_loss(generator: torch.Generator) -> None:
    layer = layer_of(MoEConfig(balance_weight=0.0))
    assert layer(torch.randn(7, WIDTH), WholeSequence(Documents((0, 7))))[1] is None


CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=WIDTH,
    num_layers=2,
    num_heads=2,
    pattern="LN",
    ffn="moe",
    initializer_range=0.3,
    mamba2=Mamba2Config(state_size=4, head_dim=8, chunk=8),
    moe=FULL,
)


def model_of(config: ModelConfig = CONFIG) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config).double()


def loss_of(model: LanguageModel, *args: object, **options: object) -> LossOutput:
    out = model(*args, **options)
    assert isinstance(out, LossOutput)
    return out


def data(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels, and weights of which some are zero."""
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(0, 40, (length,), generator=generator) for _ in range(2))
    return tokens, labels, (torch.arange(length) % 3 > 0).double()


def test_packing_changes_no_loss_and_no_gradient() -> None:
    tokens, labels, weights = data(60)
    model = model_of()
    packed = loss_of(model, tokens, WholeSequence(Documents(BOUNDS)), labels=labels, weights=weights)
    packed.loss_sum.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = []
    for start, stop in zip(BOUNDS, BOUNDS[1:]):
        own, shard = slice(start, stop), WholeSequence(Documents((0, stop - start)))
        alone.append(loss_of(model, tokens[own], shard, labels=labels[own], weights=weights[own]))
        alone[-1].loss_sum.backward()
    assert_close(packed.loss_sum.detach(), sum(out.loss_sum.detach() for out in alone), "loss")
    assert_close(packed.aux_sum, sum(out.aux_sum for out in alone), "auxiliary loss")
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad, f"gradient of {name}")


def test_the_loss_holds_the_auxiliary_one_in_training_only() -> None:
    tokens, labels, weights = data(60)
    model, shard = model_of(), WholeSequence(Documents(BOUNDS))
    training = loss_of(model, tokens, shard, labels=labels, weights=weights)
    evaluation = loss_of(model.eval(), tokens, shard, labels=labels, weights=weights)
    assert evaluation.aux_sum is None
    assert training.aux_sum > 0.1 and not training.aux_sum.requires_grad
    assert_close(training.loss_sum - training.aux_sum, evaluation.loss_sum, "loss")


def test_an_empty_stream_reaches_every_parameter() -> None:
    model = model_of()
    none = torch.zeros(0, dtype=torch.int64)
    out = loss_of(model, none, WholeSequence(Documents((0,))), labels=none)
    out.loss_sum.backward()
    assert out.loss_sum == 0 and out.aux_sum == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() == 0, name


def test_experts_that_no_token_chose_get_no_gradient(generator: torch.Generator) -> None:
    layer = layer_of(MoEConfig(num_experts=6, top_k=2))
    x = torch.randn(1, WIDTH, generator=generator)
    layer(x, WholeSequence(Documents((0, 1))))[0].sum().backward()
    touched = (layer.experts.gate_up.grad.abs().amax((1, 2)) > 0).sum()
    assert touched == 2


class Mixed(nn.Module):
    """The layer as a module of the exactness cell: each document's auxiliary loss scales its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer_of()

    def forward(self, x: Tensor, shard: SequenceShard, state: None = None) -> tuple[Tensor, None]:
        y, aux = self.layer(x, shard)
        return y * aux[shard.document_ids][:, None], None


def exactness(rank: int, world_size: int, num_tokens: int) -> dict[str, tuple[float, str]]:
    comm, worst, module = Comm(dist.group.WORLD), {}, Mixed()
    for table, bounds in document_tables(num_tokens).items():
        documents = Documents(bounds)
        problem = make_problem(module, documents, WIDTH, 1, torch.float64, False)
        for name, lengths in rank_lengths(num_tokens, world_size).items():
            layout = SequenceLayout.contiguous(num_tokens, world_size, lengths)
            for tensor, value in compare(module, functools.partial(make_shard, comm), layout, problem, comm).items():
                if not value <= worst.get(tensor, (-1.0,))[0]:
                    worst[tensor] = (value, f"documents {table}, {name}")
    return worst


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
def test_ranks_equal_one_process(world_size: int) -> None:
    for rank, worst in enumerate(run_ranks(exactness, world_size, num_tokens=37, timeout=120)):
        assert {"output", "input gradient", "gradient of layer.router", "gradient of layer.experts.down"} <= set(worst)
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[torch.float64], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


def whole_model(rank: int, world_size: int, mode: str) -> dict[str, object]:
    """The loss summed over ranks, the gradients summed over ranks, and the messages of the backward."""
    torch.set_default_dtype(torch.float64)  # the same draws as in the test's own process
    try:
        return _whole_model(rank, world_size, mode)
    finally:
        torch.set_default_dtype(torch.float32)


def _whole_model(rank: int, world_size: int, mode: str) -> dict[str, object]:
    comm, model = Comm(dist.group.WORLD), model_of()
    model.activation_checkpointing = mode
    layout = SequenceLayout.contiguous(60, world_size, (20, 0, 40) if world_size == 3 else None)
    rows = slice(*layout.parts[rank][0])
    tokens, labels, weights = (tensor[rows] for tensor in data(60))
    shard = make_shard(comm, layout, Documents(BOUNDS))
    out = loss_of(model, tokens, shard, labels=labels, weights=weights)
    comm.ledger.reset()
    out.loss_sum.backward()
    labels_sent = {label for label, _ in comm.ledger.counts}
    gradients = {name: comm.all_reduce(p.grad, "test").wait() for name, p in model.named_parameters()}
    return {"loss": comm.all_reduce(out.loss_sum.detach(), "test").wait(), "sent": labels_sent, "gradients": gradients}


@pytest.mark.parametrize("mode", ("none", "full"))
@pytest.mark.parametrize("world_size", (2, 3))
def test_a_model_on_ranks_equals_itself(world_size: int, mode: str) -> None:
    tokens, labels, weights = data(60)
    model = model_of()
    expected = loss_of(model, tokens, WholeSequence(Documents(BOUNDS)), labels=labels, weights=weights)
    expected.loss_sum.backward()
    for found in run_ranks(whole_model, world_size, mode=mode):
        assert "total backward" in found["sent"] and "total forward" not in found["sent"]
        assert_close(found["loss"], expected.loss_sum.detach(), "loss")
        for name, parameter in model.named_parameters():
            assert_close(found["gradients"][name], parameter.grad, f"gradient of {name}")


def test_the_router_computes_in_float32_under_autocast(generator: torch.Generator) -> None:
    layer = layer_of().float()
    x = torch.randn(60, WIDTH, generator=generator, dtype=torch.float32)
    shard = WholeSequence(Documents(BOUNDS))
    with torch.autocast("cpu", torch.bfloat16):
        _, lowered = layer(x, shard)
    assert_bitwise_equal(lowered, layer(x, shard)[1], "aux")


def test_flops_count_the_experts_a_token_uses() -> None:
    layer = layer_of(MoEConfig(num_experts=8, top_k=2))
    assert layer.flops_per_token() == 2 * (8 * WIDTH) + 2 * SwiGLU(WIDTH, FFN).flops_per_token()


@pytest.mark.parametrize("changes", ({"top_k": 9}, {"top_k": 0}, {"balance_weight": -1.0}))
def test_nonsense_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        MoEConfig(**changes)  # type: ignore[arg-type]


def test_an_unknown_feed_forward_is_refused() -> None:
    with pytest.raises(UserError, match="swiglu2"):
        dataclasses.replace(CONFIG, ffn="swiglu2")
