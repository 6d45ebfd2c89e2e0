"""JRT and LongVQ: their papers' equations written out, exact on ranks, isolated, the same by chunks and by single tokens."""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.config import ModelConfig
from longhaul.models.errors import UserError
from longhaul.models.lm import LanguageModel
from longhaul.models.mixers.jrt import JRT, JRTConfig, repeat_context, two_part_targets
from longhaul.models.mixers.longvq import LongVQ, LongVQConfig
from longhaul.models.mixers.registry import MIXERS as REGISTRY
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.parallel.attention.all_gather import AllGatherAttention
from longhaul.parallel.comm import Comm
from longhaul.parallel.exchange.registry import make_exchange
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.shard import RankShard
from tests.harness.cases import document_tables, rank_lengths
from tests.harness.numerics import TOLERANCE, assert_bitwise_equal, assert_close, assert_trees_close
from tests.harness.pool import run_ranks

WIDTH, HEADS, PREFIX = 8, 2, 7
CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=WIDTH,
    num_layers=2,
    num_heads=HEADS,
    pattern="L",
    ffn_hidden_size=16,
    jrt=JRTConfig(prefix_length=PREFIX, feature_dim=3, chunk=8),
    longvq=LongVQConfig(num_codes=6, chunk=8),
)
MIXERS = ("jrt", "jrt elu+1", "longvq")
BOUNDS = (0, 3, 5, 33, 34, 60)


def make_module(mixer: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    name, _, feature_map = mixer.partition(" ")
    jrt = dataclasses.replace(CONFIG.jrt, feature_map=feature_map or "taylor")
    module = REGISTRY[name].build(dataclasses.replace(CONFIG, jrt=jrt), layer=1)
    module.reset_parameters()
    with torch.no_grad():  # far from its small initial values, so that weights differ between tokens
        for parameter in module.parameters():
            parameter.mul_(3)
    return module.to(dtype)


def make_shard(comm: Comm, exchange: str, layout: SequenceLayout, documents: Documents, keep_state: bool) -> RankShard:
    return RankShard(
        layout, documents, comm, make_exchange(exchange, comm), AllGatherAttention(comm), keep_state=keep_state
    )


def exactness(
    rank: int,
    world_size: int,
    mixer: str,
    dtype: torch.dtype,
    exchange: str = "all_gather",
    tables: tuple[str, ...] = ("one", "many_short", "spanning", "mixed"),
    num_tokens: int = 37,
) -> dict[str, tuple[float, str]]:
    """The worst error of every tensor over tables and layouts, with where it was."""
    comm, worst = Comm(dist.group.WORLD), {}
    module = make_module(mixer, dtype).eval()  # in training, JRT takes no stream from position 5
    for table in tables:
        for first_position, keep_state in ((0, False), (0, True), (5, False), (9, True)):
            documents = Documents(document_tables(num_tokens)[table], first_position)
            problem = make_problem(module, documents, WIDTH, 1, dtype, keep_state)
            layouts = {
                name: SequenceLayout.contiguous(num_tokens, world_size, lengths)
                for name, lengths in rank_lengths(num_tokens, world_size).items()
            }
            layouts["zigzag"] = SequenceLayout.make("zigzag", num_tokens, world_size)
            for name, layout in layouts.items():
                errors = compare(module, functools.partial(make_shard, comm, exchange), layout, problem, comm)
                for tensor, value in errors.items():
                    if not value <= worst.get(tensor, (-1.0,))[0]:
                        worst[tensor] = (value, f"documents {table} from {first_position}, {name}, state {keep_state}")
    return worst


def check(results: list[dict[str, tuple[float, str]]], dtype: torch.dtype) -> None:
    for rank, worst in enumerate(results):
        assert {"output", "input gradient", "final state 0", "state gradient 0"} <= set(worst)
        for tensor, (value, where) in worst.items():
            assert value <= TOLERANCE[dtype], f"rank {rank}, {tensor}: error {value:.1e} at {where}"


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("mixer", MIXERS)
def test_ranks_equal_one_process(mixer: str, world_size: int) -> None:
    check(run_ranks(exactness, world_size, mixer=mixer, dtype=torch.float64, timeout=120), torch.float64)


@pytest.mark.parametrize("exchange", ("ring", "all_scan"))
@pytest.mark.parametrize("mixer", ("jrt", "longvq"))
def test_every_exchange(mixer: str, exchange: str) -> None:
    options = {"exchange": exchange, "tables": ("mixed",), "dtype": torch.float64}
    check(run_ranks(exactness, 3, mixer=mixer, timeout=120, **options), torch.float64)


@pytest.mark.parametrize("mixer", MIXERS)
def test_single_precision(mixer: str) -> None:
    check(run_ranks(exactness, 3, mixer=mixer, dtype=torch.float32, tables=("one", "mixed"), timeout=120), torch.float32)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_packed_document_equals_itself_alone(mixer: str, generator: torch.Generator) -> None:
    module = make_module(mixer)
    x = torch.randn(60, WIDTH, generator=generator, dtype=torch.float64)
    packed, _ = module(x, WholeSequence(Documents(BOUNDS)))
    for start, stop in zip(BOUNDS, BOUNDS[1:]):
        alone, _ = module(x[start:stop], WholeSequence(Documents((0, stop - start))))
        assert_close(packed[start:stop], alone, f"document {start}..{stop}")


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_token_sees_a_later_one(mixer: str, training: bool, generator: torch.Generator) -> None:
    """JRT is causal behind its prefix, which it reads as a whole."""
    module, shard = make_module(mixer).train(training), WholeSequence(Documents((0, 60)))
    x = torch.randn(60, WIDTH, generator=generator, dtype=torch.float64)
    before, _ = module(x, shard)
    for edited in (1, PREFIX, 31, 59):
        changed = x.clone()
        changed[edited] = -changed[edited]
        after, _ = module(changed, shard)
        if mixer.startswith("jrt") and edited < PREFIX:
            assert (after != before).any(1).all(), "the prefix is read by all"
            continue
        assert_bitwise_equal(after[:edited], before[:edited], f"outputs before token {edited}")
        assert (after[edited:] != before[edited:]).any(1).any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_one_token_steps_after_a_prompt_equal_the_whole(mixer: str, generator: torch.Generator) -> None:
    module, prompt = make_module(mixer), PREFIX if mixer.startswith("jrt") else 1
    x = torch.randn(30, WIDTH, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        whole, final = module(x, WholeSequence(Documents((0, 30)), keep_state=True))
        first, state = module(x[:prompt], WholeSequence(Documents((0, prompt)), keep_state=True))
        outputs = [first]
        for t in range(prompt, 30):
            shard = WholeSequence(Documents((0, 1), first_position=t), keep_state=True)
            y, state = module(x[t : t + 1], shard, state)
            outputs.append(y)
    assert_close(torch.cat(outputs), whole, "outputs")
    assert_trees_close(state, final, "state")


def test_a_short_prompt_is_the_prefix(generator: torch.Generator) -> None:
    """What follows a prompt shorter than M is generated, so it is no prefix: as if M were the prompt's length."""
    x = torch.randn(12, WIDTH, generator=generator, dtype=torch.float64)
    module, short = make_module("jrt").eval(), make_module("jrt")
    short.config = dataclasses.replace(short.config, prefix_length=4)
    _, state = module(x[:4], WholeSequence(Documents((0, 4)), keep_state=True))
    rest, _ = module(x[4:], WholeSequence(Documents((0, 8), first_position=4)), state)
    assert_close(rest, short(x, WholeSequence(Documents((0, 12))))[0][4:], "outputs")


def test_training_refuses_a_border_inside_a_prefix() -> None:
    x = torch.zeros(4, WIDTH, dtype=torch.float64)
    make_module("jrt")(x, WholeSequence(Documents((0, 4), first_position=PREFIX)))
    with pytest.raises(UserError, match=r"position 6 .* prefix of 7"):
        make_module("jrt")(x, WholeSequence(Documents((0, 4), first_position=PREFIX - 1)))


@pytest.mark.parametrize("feature_map", ("taylor", "elu+1"))
def test_prefix_linear_attention_is_equation_3(feature_map: str, generator: torch.Generator) -> None:
    module = make_module(f"jrt {feature_map}")
    assert isinstance(module, JRT)
    T, F = 20, CONFIG.jrt.feature_dim
    x = torch.randn(T, WIDTH, generator=generator, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in module.qkv(x).split((HEADS * F, HEADS * F, WIDTH), dim=-1))
    k_e, v_e = (t.unflatten(-1, (HEADS, -1)) for t in module.kv_prefix(x).split((HEADS * F, WIDTH), dim=-1))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if feature_map == "taylor":
            s = torch.einsum("ihf,jhf->ijh", a, b) / F**0.5
            return 1 + s + s * s / 2
        return torch.einsum("ihf,jhf->ijh", torch.nn.functional.elu(a) + 1, torch.nn.functional.elu(b) + 1)

    causal = kernel(q, k) * torch.ones(T, T, dtype=torch.float64).tril()[..., None]
    prefix = kernel(q, k_e[:PREFIX])
    y = torch.einsum("ijh,jhv->ihv", causal, v) + torch.einsum("ijh,jhv->ihv", prefix, v_e[:PREFIX])
    y = y / (causal.sum(1) + prefix.sum(1))[..., None]
    assert_close(module(x, WholeSequence(Documents((0, T))))[0], module.out(y.flatten(1)), "y")


def test_quantised_attention_is_softmax_attention_to_codes(generator: torch.Generator) -> None:
    """Against the quadratic form of the paper, with keys replaced by their nearest codes; no key is near a tie."""
    module = make_module("longvq")
    assert isinstance(module, LongVQ)
    T, K = 40, WIDTH // HEADS
    x = torch.randn(T, WIDTH, generator=generator, dtype=torch.float64)
    q, k, v = module.qkv(x).unflatten(-1, (3, HEADS, K)).unbind(1)

    def unit(t: torch.Tensor) -> torch.Tensor:
        return t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    codes = unit(module.codebook)
    distance = (unit(k)[:, :, None] - codes[None]).square().sum(-1)  # [T, H, N]
    nearest = distance.topk(2, largest=False).values
    assert (nearest[..., 1] - nearest[..., 0]).min() > 1e-4
    quantised = codes[torch.arange(HEADS), distance.argmin(-1)]  # [T, H, K]
    scores = torch.einsum("ihk,jhk->hij", unit(q), quantised) / K**0.5
    masked = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    o = torch.einsum("hij,jhv->ihv", masked.softmax(-1), v).flatten(1)
    y = module.out(o * torch.nn.functional.silu(module.gate(x)))
    assert_close(module(x, WholeSequence(Documents((0, T))))[0], y, "y")
    assert len(set(distance.argmin(-1).flatten().tolist())) > 2, "codes are used"


def test_every_parameter_of_quantised_attention_learns(generator: torch.Generator) -> None:
    module = make_module("longvq")
    x = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64)
    module(x, WholeSequence(Documents((0, 40))))[0].square().sum().backward()
    for part in module.qkv.weight.grad.chunk(3):
        assert part.abs().max() > 1e-3, "queries, keys and values"
    assert module.codebook.grad.abs().max() > 1e-3


def moving_average(rank: int, world_size: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What all ranks' tokens chose in one backward, and the codebook after it."""
    comm, module = Comm(dist.group.WORLD), averaging()
    lengths = rank_lengths(num_tokens, world_size)["uneven"]
    layout = SequenceLayout.contiguous(num_tokens, world_size, lengths)
    own = torch.cat([keys_of()[0][a:b] for a, b in layout.parts[rank]])
    shard = make_shard(comm, "all_gather", layout, Documents((0, num_tokens)), False)
    module(own, shard)[0].sum().backward()
    observed = comm.all_reduce(module.observed(), "test").wait()
    module.after_step(observed)
    return observed, module.codebook


def averaging() -> LongVQ:
    """The layer whose codebook is a moving average, of the same values."""
    learnt, config = make_module("longvq"), dataclasses.replace(CONFIG.longvq, ema_rate=0.5)
    module = LongVQ(WIDTH, HEADS, config).double().train()
    module.load_state_dict(learnt.state_dict())
    return module


def keys_of() -> tuple[torch.Tensor, torch.Tensor]:
    """60 tokens, and their keys in that layer."""
    module = averaging()
    x = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, module.normalised(module.qkv(x).unflatten(-1, (3, HEADS, -1))[:, 1]).detach()


def test_the_codebooks_average_is_a_step_of_k_means() -> None:
    module, shard = averaging(), WholeSequence(Documents((0, 60)))
    x, k = keys_of()

    def distances() -> torch.Tensor:
        return (k[:, :, None] - module.normalised(module.codebook)).square().sum(-1)  # [T, H, N]

    before, chosen = distances(), distances().argmin(-1)
    with torch.no_grad():
        module(x, shard)
    module.eval()(x, shard)[0].sum().backward()
    assert module.observed().abs().max() == 0, "only training counts"
    module.train()(x, shard)[0].sum().backward()
    codes, observed = module.normalised(module.codebook), module.observed()
    module.after_step(observed)
    assert module.chosen is None and distances().amin(-1).mean() < before.amin(-1).mean()
    for head in range(HEADS):
        for code in range(6):
            own = k[chosen[:, head] == code, head]
            assert observed[head, code, -1] == len(own)
            expected = codes[head, code] if not len(own) else 0.5 * codes[head, code] + 0.5 * own.mean(0)
            assert_close(module.codebook[head, code], expected, f"code {code} of head {head}")
    for rank_observed, codebook in run_ranks(moving_average, 3, num_tokens=60, timeout=60):
        assert_close(rank_observed, observed, "observed")
        assert_close(codebook, module.codebook, "codebook")


def test_two_part_targets() -> None:
    documents = Documents((0, 20, 24, 25, 40))
    tokens = torch.arange(40) % 20
    targets = two_part_targets(tokens, documents, PREFIX, mask_id=23, rate=0.4)
    masked = targets.tokens != tokens
    assert (targets.tokens[masked] == 23).all() and (targets.labels[masked] == tokens[masked]).all()
    for start, stop in zip(documents.bounds, documents.bounds[1:]):
        inside, long = min(PREFIX, stop - start), stop - start > PREFIX
        last = start + inside - 1 if long else stop  # the prefix's last token announces the next one
        assert not masked[last:stop].any()
        assert masked[start:last].sum() == max(1, round(0.4 * (last - start)))
        assert_close(targets.weights[start:last].sum(), torch.tensor(0.25 * inside), "weight of masked tokens")
        assert (targets.weights[last : stop - 1] == 1).all() and (not long or targets.weights[stop - 1] == 0)
        assert (targets.labels[last : stop - 1] == tokens[last + 1 : stop]).all()
    assert not (targets.weights[:7][~masked[:7]][:-1]).any()


def test_two_part_loss_is_the_papers(generator: torch.Generator) -> None:
    """Where both parts are as long: mean over the decoder's tokens + 0.25 mean over masked ones, up to the sum of weights."""
    torch.manual_seed(0)
    model = LanguageModel(dataclasses.replace(CONFIG, linear_mixer="jrt")).double()
    documents = Documents((0, 2 * PREFIX))
    tokens = torch.randint(0, 23, (2 * PREFIX,), generator=generator)
    shown, labels, weights = two_part_targets(tokens, documents, PREFIX, mask_id=23, rate=0.3)
    out = model(shown, WholeSequence(documents), labels=labels, weights=weights)
    hidden, _ = model(shown, WholeSequence(documents))
    nll = torch.nn.functional.cross_entropy(model.logits(hidden), labels, reduction="none")
    masked = shown == 23
    decoder = torch.arange(2 * PREFIX)
    decoder = (decoder >= PREFIX - 1) & (decoder < 2 * PREFIX - 1)
    expected = PREFIX * (nll[decoder].mean() + 0.25 * nll[masked].mean())
    assert_close(out.loss_sum, expected, "loss")
    assert_close(out.weight_sum.double(), torch.tensor(1.25 * PREFIX, dtype=torch.float64), "weights", tolerance=1e-6)


def test_repeat_context() -> None:
    tokens, labels, weights = repeat_context(torch.tensor([5, 6, 7, 8, 9]), context=3)
    assert tokens.tolist() == [5, 6, 7, 5, 6, 7, 8, 9]
    assert labels.tolist()[:-1] == [6, 7, 5, 6, 7, 8, 9]
    assert weights.tolist() == [1, 1, 0, 0, 0, 1, 1, 0]
    once = repeat_context(torch.tensor([5, 6, 7]), context=2, times=1)
    assert once.tokens.tolist() == [5, 6, 7] and once.weights.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("bad", "names"),
    (
        (lambda: JRTConfig(feature_map="exp"), "feature_map"),
        (lambda: JRTConfig(prefix_length=-1), "prefix_length"),
        (lambda: LongVQConfig(num_codes=0), "num_codes"),
        (lambda: LongVQConfig(ema_rate=1.5), "ema_rate"),
        (lambda: repeat_context(torch.tensor([1]), 2), "repeat"),
        (lambda: two_part_targets(torch.tensor([1]), Documents((0, 1), 3), 2, 0), "begins at position 3"),
        (lambda: two_part_targets(torch.tensor([1]), Documents((0, 1)), 2, 0, rate=0.0), "masked"),
    ),
)
def test_impossible_options_are_refused(bad, names: str) -> None:
    with pytest.raises(UserError, match=names):
        bad()
