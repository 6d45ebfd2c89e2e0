"""From a run's configuration to what its steps are planned with: the cluster of its places, and the cost of its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.plan.calibrate import read_calibration
from longhaul.launcher.plan.census import facts_of
from longhaul.launcher.plan.costs import cost_model, published_constants
from longhaul.launcher.plan.inputs import MEMORY, make_cluster, read_cluster
from longhaul.models.errors import UserError
from longhaul.parallel.comm import Comm
from longhaul.parallel.network import probe
from longhaul.parallel.planner import Cluster, CostModel, Link
from longhaul.parallel.planner.cluster import kinds_of
from longhaul.parallel.planner.problem import Problem
from longhaul.parallel.runtime import Runtime


def planner_inputs(config: TrainConfig, places: Comm, runtime: Runtime) -> tuple[Cluster, CostModel]:
    """Cluster and cost model of a run, the same on every process.

    Args:
        places: the data axis, whose links are measured if no cluster file says what they carry.

    Raises:
        UserError: the memory is not known, or the file is of another cluster.
    """
    wanted, parallel = config.parallel.planner, config.parallel
    constants = read_calibration(Path(wanted.calibration)) if wanted.calibration else published_constants()
    # fsdp gathers each block's parameters over all processes, and tokens travel to experts: barriers between layers.
    objective = "split" if parallel.data_parallel_backend == "fsdp" or parallel.expert_parallel_size > 1 else "sum"
    model = cost_model(facts_of(config.model), config, constants, places.size, objective=objective)
    if wanted.cluster is not None:
        values = read_cluster(wanted.cluster)
        if values["ranks"] != places.size:
            raise UserError(
                f"parallel.planner.cluster {wanted.cluster} has {values['ranks']} ranks, but {places.size} are planned: "
                "mend its ranks or start as many processes."
            )
    elif wanted.memory_tokens is not None:
        network = probe(places, runtime.device)
        network = runtime.on_main(lambda: network)  # ranks that divide heads measured other groups
        link = {"span": places.size, "bandwidth": network.collective.bytes_per_s, "latency": network.message.latency_s}
        values = {"ranks": places.size, "links": [link]}
    else:
        raise UserError(
            "parallel.planner does not know the memory: give parallel.planner.memory_tokens, the tokens whose activations "
            "fit on a process, or parallel.planner.cluster, a file that states memory."
        )
    if wanted.memory_tokens is not None:
        values = {**{key: value for key, value in values.items() if key not in MEMORY}, "memory_tokens": wanted.memory_tokens}
    return make_cluster(values, model), model


def most_tokens(cluster: Cluster, model: CostModel) -> int:
    """The longest document that some block holds."""
    tokens = model.tokens_per_rank(cluster)
    return max(kind.capacity(tokens) for kind in kinds_of(cluster, model.max_degree))


def check_lengths(longest: int, cluster: Cluster, model: CostModel, stream_tokens: int | None) -> None:
    """Refuse, before the first step, documents that no block holds; with `stream_tokens` chunks of them must fit.

    Args:
        longest: tokens of the longest piece of a document that a step may meet.
    """
    fits = most_tokens(cluster, model)
    if stream_tokens is None:
        Problem([longest], cluster, model)
    elif longest > fits < stream_tokens:
        raise UserError(
            f"train.stream_tokens {stream_tokens} is more than the {fits} tokens that the largest planned group holds: give "
            f"at most {fits}."
        )


def cluster_to_json(cluster: Cluster) -> list[list[float]]:
    """What may have been measured of a cluster: span, bandwidth and latency of its links."""
    return [[link.span, link.bandwidth, link.latency] for link in cluster.links]


def cluster_from_json(cluster: Cluster, links: Sequence[Sequence[Any]]) -> Cluster:
    """A cluster with the links of a checkpoint, so that a resumed run plans as the first one did."""
    return replace(cluster, links=tuple(Link(int(span), float(bandwidth), float(latency)) for span, bandwidth, latency in links))
