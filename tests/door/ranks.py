"""What the door's tests run on ranks: small mixers in float64, every table of documents, every layout."""

import functools
import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from longhaul.launcher.verify.exactness import compare, make_problem
from longhaul.models.config import ModelConfig
from longhaul.models.mixers.attention import AttentionConfig
from longhaul.models.mixers.linear_attention import LinearAttentionConfig
from longhaul.models.mixers.mamba2 import Mamba2Config
from longhaul.models.mixers.registry import MIXERS as REGISTRY
from longhaul.models.mixers.retention import RetentionConfig
from longhaul.models.ops.segments import Documents
from longhaul.parallel.attention.all_gather import AllGatherAttention
from longhaul.parallel.comm import Comm
from longhaul.parallel.exchange.all_gather import AllGather
from longhaul.parallel.layout import SequenceLayout
from longhaul.parallel.shard import RankShard
from tests.harness.cases import document_tables, rank_lengths

WIDTH = 16
CONFIG = ModelConfig(
    hidden_size=WIDTH,
    num_heads=4,
    num_kv_heads=2,
    mamba2=Mamba2Config(state_size=6, head_dim=8, num_groups=2, chunk=8),
    linear_attention=LinearAttentionConfig(feature_map="elu+1", normalize=True, chunk=8),
    retention=RetentionConfig(rotary=True, chunk=8),
)
MIXERS = ("linear_attention", "lightning", "retention", "mamba2", "attention", "window")


def remembering(module: nn.Module) -> nn.Module:
    """Gates that remember: decays of a few thousandths a token, so that what a rank hands over matters."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "A_log":
                parameter.uniform_(-6, -4)
    return module


def make_module(mixer: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIG
    if mixer == "window":
        mixer, config = "attention", ModelConfig(**{**vars(CONFIG), "attention": AttentionConfig(window=9)})
    module = REGISTRY[mixer].build(config, layer=1)
    module.reset_parameters()
    return remembering(module.to(dtype))


def make_shard(comm: Comm, layout: SequenceLayout, documents: Documents, keep_state: bool = False) -> RankShard:
    return RankShard(layout, documents, comm, AllGather(comm), AllGatherAttention(comm), keep_state=keep_state)


def every_third(world_size: int) -> Callable[[], bool]:
    """Which cells of a sweep to take: every third, so that over a sweep all values meet. `longhaul verify` takes them all."""
    cells = itertools.count()
    return lambda: world_size == 1 or next(cells) % 3 == 0


def exactness(rank: int, world_size: int, mixer: str, num_tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """The worst error of every tensor over all tables and layouts, with where it was."""
    comm, worst = Comm(dist.group.WORLD), {}
    module = make_module(mixer, dtype)
    takes = every_third(world_size)
    for table, bounds in document_tables(num_tokens).items():
        for first_position, keep_state in ((0, False), (0, True), (5, True), (5, False)):
            documents = Documents(bounds, first_position)
            problem = make_problem(module, documents, WIDTH, 1, dtype, keep_state)
            for name, lengths in rank_lengths(num_tokens, world_size).items():
                if not takes():
                    continue
                layout = SequenceLayout.contiguous(num_tokens, world_size, lengths)
                errors = compare(module, functools.partial(make_shard, comm), layout, problem, comm)
                for tensor, value in errors.items():
                    if not value <= worst.get(tensor, (-1.0,))[0]:
                        worst[tensor] = (value, f"documents {table} from {first_position}, {name}, state {keep_state}")
    return worst
