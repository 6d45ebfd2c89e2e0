"""Small clusters and lengths as files."""

from pathlib import Path
from typing import Any

import yaml

LENGTHS = [900, 40, 300, 25, 77, 410, 33, 120, 60, 205, 18, 95]


def cluster_values(**changes: Any) -> dict[str, Any]:
    """Eight ranks in two nodes; `None` leaves a key out."""
    values = {
        "ranks": 8,
        "ranks_per_node": 4,
        "memory_tokens": 256,
        "links": {"node": {"bandwidth": 1e12, "latency": 1e-6}, "network": {"bandwidth": 1e11, "latency": 2e-6}},
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


def cluster_file(folder: Path, **changes: Any) -> str:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster_values(**changes)))
    return str(path)


def lengths_file(folder: Path, lengths: list[int] | None = None) -> str:
    path = folder / "lengths.txt"
    path.write_text("\n".join(map(str, lengths or LENGTHS)) + "\n")
    return str(path)
