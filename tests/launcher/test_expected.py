"""Every step of a run receives what the formulas say, label by label."""

from pathlib import Path
from typing import Any

import pytest

from longhaul.launcher.metrics.files import read_records
from longhaul.launcher.metrics.metrics import FORMULA, RECEIVED
from longhaul.models.mixers.mamba2 import Mamba2Config
from tests.harness import run_ranks

from .runs import tiny, train_rank, write_corpus

STATE = {"state forward", "state backward", "halo forward", "halo backward"}
KEYS = {"kv forward", "kv backward"}
CASES: list[tuple[int, dict[str, Any], dict[str, dict[str, Any]], set[str]]] = [
    (2, {}, {}, STATE | KEYS),
    (3, {"exchange": "log_scan", "attention": "ring", "layout": "zigzag"}, {"data": {"carry_state": True}}, STATE | KEYS),
    (2, {"exchange_payload": "bf16", "attention": "ulysses"}, {}, STATE | {"heads forward", "heads backward"}),
    (2, {"exchange": "all_scan", "attention_head_slices": 2}, {"train": {"precision": "bf16"}}, STATE | KEYS),
    (2, {"exchange": "auto", "attention": "rsa", "layout": "contiguous_per_document"}, {}, KEYS | {"halo forward"}),
]


@pytest.mark.parametrize(("ranks", "parallel", "sections", "labels"), CASES)
def test_measured_is_formula(
    ranks: int, parallel: dict[str, Any], sections: dict[str, dict[str, Any]], labels: set[str], tmp_path: Path
) -> None:
    write_corpus(tmp_path / "corpus")
    mixer = {"linear_mixer": "mamba2", "mamba2": Mamba2Config(state_size=6, head_dim=8)}
    config = tiny(
        tmp_path,
        model={**mixer, "num_heads": 4, "num_kv_heads": 2},
        parallel={"sequence_parallel_size": ranks, **parallel},
        data={"seq_length": 61, **sections.get("data", {})},
        train={"steps": 3, "global_batch_size": 2, **sections.get("train", {})},
        checkpoint={"every": 0},
    )
    run_ranks(train_rank, ranks, config=config)
    records = [record for record in read_records(tmp_path / "run") if any(key.startswith(FORMULA) for key in record)]
    assert len(records) == 3
    for record in records:
        found = {key.removeprefix(FORMULA): value for key, value in record.items() if key.startswith(FORMULA)}
        assert labels <= set(found)
        for label, size in found.items():
            assert record.get(RECEIVED + label, 0) == size, label
        assert sum(found.values()) > 0
