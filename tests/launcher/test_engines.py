"""Options of the engines: refused where they fit nothing, arrived where they belong, and training with each."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longhaul.launcher.config import ParallelConfig
from longhaul.launcher.engines import KEYS
from longhaul.launcher.metrics.files import read_facts
from longhaul.launcher.parsing import parse
from longhaul.launcher.trainer import Trainer
from longhaul.models.errors import UserError
from longhaul.parallel.exchange.reach import Reach
from longhaul.parallel.runtime import Runtime
from tests.harness import run_ranks
from tests.harness.numerics import assert_trees_close, relative_error

from .runs import tiny, train_rank, whole_parameters, write_corpus

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"exchange": "rng"}, r"parallel\.exchange 'rng' is no exchange; did you mean 'ring'"),
    ({"attention": "rign"}, r"parallel\.attention 'rign' is no attention engine"),
    ({"layout": "zigzga"}, r"parallel\.layout 'zigzga' is no layout; did you mean 'zigzag'"),
    ({"exchange_blocks": 4}, r"exchange_blocks is 4, but parallel\.exchange all_gather has no use for it.* use all_scan\."),
    ({"exchange": "all_scan", "exchange_blocks": 0}, r"parallel\.exchange_blocks 0: .* at least 1 block"),
    ({"exchange_payload": "fp8"}, r"parallel\.exchange_payload is 'fp8': give fp32 or bf16"),
    ({"exchange": "ring", "exchange_payload": "bf16"}, r"exchange_payload bf16 would round .* ring .*: use fp32"),
    ({"exchange": "auto", "exchange_payload": "bf16", "auto_latency": 1.0}, r"auto_latency 1\.0: .* give both"),
    ({"exchange": "hierarchical", "exchange_payload": "bf16"}, r"would round the running state of exchange hierarchical"),
    ({"exchange_inside": "log_scan"}, r"exchange_inside is log_scan, .* use hierarchical"),
    ({"exchange": "hierarchical", "exchange_inside": "ring"}, r"parallel\.exchange_inside ring: .* cannot work inside a node"),
    ({"exchange": "hierarchical", "exchange_across": "rng"}, r"parallel\.exchange_across rng: .* 'rng' is no exchange"),
    ({"auto_bandwidth": 1e9}, r"auto_bandwidth is 1000000000\.0, .* use auto"),
    ({"exchange": "auto", "auto_latency": -1.0, "auto_bandwidth": 1e9}, r"parallel\.auto_latency -1\.0"),
    ({"exchange": "auto", "auto_local_time": -1.0}, r"parallel\.auto_local_time is -1\.0: give 0 or more"),
    ({"reach_tolerance": 0.1}, r"'all_gather' sends all maps to all, so reach_tolerance 0\.1 saves nothing"),
    ({"exchange": "ring", "reach_tolerance": 1.5}, r"reach_tolerance is 1\.5: give a number between 0 and 1"),
    ({"attention_head_slices": 0}, r"parallel\.attention_head_slices 0: .* at least 1 slice"),
    ({"attention": "ring", "attention_head_slices": 2}, r"attention_head_slices is 2, .* use all_gather"),
    ({"attention_backward": "q"}, r"attention_backward is q, .* use ring"),
    ({"attention": "ring", "attention_backward": "x"}, r"parallel\.attention_backward x: .* one of auto, kv, q"),
    ({"layout_stripe": 2}, r"layout_stripe is 2, .* use striped"),
    ({"layout": "striped", "layout_stripe": 0}, r"parallel\.layout_stripe is 0"),
    ({"layout_shares": (1, 2)}, r"gives 2 shares for parallel\.sequence_parallel_size 1: give one a process"),
    ({"layout_shares": (1, -2), "sequence_parallel_size": 2}, r"layout_shares is \[1, -2\]: give 2 numbers that are not neg"),
    ({"layout_shares": (0, 0), "sequence_parallel_size": 2}, r"not all zero"),
    ({"layout": "zigzag", "layout_shares": (1, 2), "sequence_parallel_size": 2}, r"layout_shares is .* use contiguous"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_options_that_fit_nothing_are_one_sentence(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ParallelConfig(**keys)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("engines")
    write_corpus(made / "corpus")
    return made


HIERARCHY = {"exchange": "hierarchical", "exchange_inside": "log_scan", "exchange_across": "log_scan"}
LINK = {"auto_latency": 1e-3, "auto_bandwidth": 1e6, "auto_local_time": 1e-5}
ARRIVES: list[tuple[dict[str, Any], str, Any]] = [
    ({"exchange_payload": "bf16"}, "exchange.rounds", True),
    ({"exchange": "all_scan", "exchange_blocks": 3}, "exchange.blocks", 3),
    (HIERARCHY, "exchange.inside.name", "log_scan"),
    (HIERARCHY, "exchange.across.name", "log_scan"),
    ({"exchange": "auto", **LINK}, "exchange.network.message.latency_s", 1e-3),
    ({"exchange": "auto", **LINK}, "exchange.network.message.bytes_per_s", 1e6),
    ({"exchange": "auto", **LINK}, "exchange.local_s_per_token", 1e-5),
    ({"exchange": "ring", "reach_tolerance": 0.25}, "exchange.tolerance", 0.25),
    ({"attention_head_slices": 2}, "attention.head_slices", 2),
    ({"attention": "ring", "attention_backward": "q"}, "attention.backward", "q"),
    ({"layout": "striped", "layout_stripe": 5}, "layout_options", {"block": 5}),
]


@pytest.mark.parametrize(("keys", "where", "value"), ARRIVES)
def test_options_arrive(keys: dict[str, Any], where: str, value: Any, folder: Path) -> None:
    model = {"pattern": "NN"} if keys.get("layout") == "striped" else {}
    config = tiny(folder, parallel=keys, model=model, checkpoint={"every": 0, "folder": str(folder / "arrives")})
    found: Any = Trainer(config, Runtime(device="cpu")).engine
    for name in where.split("."):
        found = getattr(found, name)
    assert found == value


def test_every_option_of_an_engine_has_a_key(folder: Path) -> None:
    assert {*KEYS} == {key for keys, _, _ in ARRIVES for key in keys if key in KEYS} | {"layout_shares"}
    flags = parse(["--parallel.layout_shares", "[2,0.5]", "--parallel.sequence_parallel_size", "2"])
    assert flags.parallel.layout_shares == (2.0, 0.5)


def trained(folder: Path, name: str, ranks: int, model: dict[str, Any], parallel: dict[str, Any]) -> dict[str, torch.Tensor]:
    config = tiny(
        folder,
        model=model,
        parallel={"sequence_parallel_size": ranks, **parallel},
        optimizer={"name": "sgd", "lr": 0.2, "min_lr": 0.1, "clip": 0.0},
        train={"steps": 3},
        checkpoint={"every": 0, "folder": str(folder / name)},
    )
    if ranks == 1:
        return train_rank(0, 1, config)[1]
    return run_ranks(train_rank, ranks, config=config)[0][1]


HYBRID = {"num_heads": 4, "num_kv_heads": 2}
EXACT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (HYBRID, {"attention_head_slices": 2}),
    (HYBRID, {"attention": "ring", "attention_backward": "q", "exchange": "all_scan", "exchange_blocks": 2}),
    (HYBRID, {"layout_shares": (3, 1)}),
    ({"pattern": "NN"}, {"layout": "striped", "layout_stripe": 3}),
]


@pytest.mark.parametrize(("model", "parallel"), EXACT)
def test_two_ranks_are_one(model: dict[str, Any], parallel: dict[str, Any], folder: Path) -> None:
    name = "_".join(parallel)
    alone = trained(folder, f"{name}_alone", 1, model, {})
    assert_trees_close(trained(folder, name, 2, model, parallel), alone, name)


def test_a_rounded_payload_is_a_little_off(folder: Path) -> None:
    alone = trained(folder, "exact", 1, {}, {})
    two = trained(folder, "rounded", 2, {}, {"exchange_payload": "bf16"})
    errors = [relative_error(two[name], alone[name]) for name in alone]
    assert 1e-6 < max(errors) < 1e-2, max(errors)


RETENTION = {"linear_mixer": "retention", "pattern": "LL"}


def bound_of(rank: int, world_size: int, config: Any) -> tuple[float, dict[str, torch.Tensor]]:
    trainer = Trainer(config, Runtime(rank, world_size, device="cpu"))
    trainer.run()
    reach = trainer.engine.exchange
    assert isinstance(reach, Reach)
    return reach.bound, whole_parameters(trainer.model.model)


def test_a_reach_that_is_cut_trains_within_its_bound(folder: Path) -> None:
    # Two heads forget as 31/32 and 63/64 a token, a part of the zigzag has 24 of the stream's 96: a share of 0.685 is left.
    alone = trained(folder, "whole", 1, RETENTION, {})
    config = tiny(
        folder,
        model=RETENTION,
        parallel={"sequence_parallel_size": 2, "exchange": "ring", "layout": "zigzag", "reach_tolerance": 0.7},
        optimizer={"name": "sgd", "lr": 0.2, "min_lr": 0.1, "clip": 0.0},
        train={"steps": 3},
        checkpoint={"every": 0, "folder": str(folder / "cut")},
    )
    for bound, two in run_ranks(bound_of, 2, config=config):
        assert bound == pytest.approx((63 / 64) ** 24, rel=1e-5)
        errors = [relative_error(two[name], alone[name]) for name in alone]
        assert 1e-5 < max(errors) < 0.1, max(errors)
    (line,) = read_facts(folder / "cut")["engines"]
    assert "leave at most 0.7 of a state" in line and "off by at most 0.69 of" in line


def told_by_auto(rank: int, world_size: int, config: Any) -> tuple[list[str], list[str]]:
    """What was printed, and what is known in the end."""
    trainer, printed = Trainer(config, Runtime(rank, world_size, device="cpu")), []
    with mock.patch("longhaul.launcher.metrics.metrics.Metrics.message", lambda _, text: printed.append(text)):
        trainer.run()
    return printed, trainer.engine.describe()


def test_what_auto_measured_and_chose_is_told(folder: Path) -> None:
    config = tiny(
        folder,
        parallel={"sequence_parallel_size": 2, "exchange": "auto"},
        train={"steps": 5},
        checkpoint={"every": 0, "folder": str(folder / "auto")},
    )
    printed, _ = run_ranks(told_by_auto, 2, config=config)[0]
    probed = next(index for index, line in enumerate(printed) if line.startswith("auto on 2 ranks: a message takes"))
    chosen = [index for index, line in enumerate(printed) if "ms of local work: " in line]
    assert chosen and probed < min(chosen)
    assert {"forward", "backward"} <= {word.rstrip(",") for index in chosen for word in printed[index].split()}
    recorded = read_facts(folder / "auto")["engines"]
    assert recorded[0] == printed[probed] and {printed[index] for index in chosen} <= set(recorded)
    assert not any("not timed yet" in line for line in recorded[1:])
