"""Lengths and clusters from files; every mistake is one sentence with its remedy."""

from __future__ import annotations

import difflib
import importlib.resources
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from longhaul.launcher.data import DataConfig, open_corpus, open_tokenizer, split_corpus
from longhaul.launcher.data.packing import shuffled
from longhaul.models.errors import UserError
from longhaul.parallel.planner import Cluster, CostModel

MEBIBYTE = 1 << 20
MEMORY = ("memory", "memory_mb", "memory_tokens")
KEYS = ("ranks", "ranks_per_node", *MEMORY, "links", "all_to_all", "speeds", "link_speeds")
LEVELS = ("node", "network")
LINK = ("bandwidth", "latency")

CLUSTER_HELP = """\
cluster file (YAML; bandwidths in bytes a second, latencies in seconds):
  ranks: 64              processes of the job
  ranks_per_node: 8      consecutive ranks that share a machine (default: all)
  memory: 30.0e+9        bytes a rank may use for model states and activations; or
  memory_mb: 28610       the same in MiB; or
  memory_tokens: 6400    tokens of activations that fit on a rank, model states apart
  links:
    node: {bandwidth: 100.0e+9, latency: 1.0e-5}     inside a machine
    network: {bandwidth: 20.0e+9, latency: 2.0e-5}   between machines
                         or a list of levels {span: RANKS, bandwidth: ..., latency: ...}, the last over all ranks
  all_to_all: {8: 96.5e+9, 64: 4.9e+9}  measured all-to-all bandwidth by degree (default: links)
  speeds: [1, 1, 0.8]    relative speed of each rank, or of each node (default: all 1)
  link_speeds: [...]     relative speed of each rank's, or node's, link (default: all 1)
"""


def read_yaml(path: Path, flag: str) -> Any:
    """A YAML file's contents."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror}): give the path of a file.") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise UserError(f"{flag} {path} is not YAML: longhaul plan --help shows what it holds.") from None


def shipped_clusters() -> dict[str, Any]:
    """Cluster files that come with Longhaul, by name."""
    folder = importlib.resources.files("longhaul.configs.clusters")
    return {each.name[:-5]: each for each in folder.iterdir() if each.name.endswith(".yaml")}


def read_cluster(name: str) -> dict[str, Any]:
    """Contents of a cluster file, given by its path or by the name of a shipped one; keys are checked."""
    shipped = shipped_clusters()
    path = Path(str(shipped[name])) if name in shipped and not Path(name).exists() else Path(name)
    if not path.exists():
        near = difflib.get_close_matches(path.stem, shipped, n=1) or list(shipped)[:1]
        raise UserError(f"There is no cluster file {name}: give its path, or the shipped cluster {near[0]}.")
    values = read_yaml(path, "--cluster")
    if not isinstance(values, dict):
        raise UserError(f"The cluster file {name} holds no keys: longhaul plan --help shows them.")
    _known(values, KEYS, f"the cluster file {name}")
    if values.get("ranks") is None:
        raise UserError(f"The cluster file {name} states no ranks: add ranks, the number of processes.")
    given = [key for key in MEMORY if values.get(key) is not None]
    if len(given) != 1:
        said = "no memory" if not given else " and ".join(given)
        raise UserError(
            f"The cluster file {name} states {said}: give one of memory (bytes a rank may use), memory_mb and "
            "memory_tokens (tokens that fit on a rank)."
        )
    if not values.get("links"):
        raise UserError(f"The cluster file {name} states no links: add links with {' and '.join(LEVELS)}, each with bandwidth.")
    return values


def make_cluster(values: Mapping[str, Any], model: CostModel) -> Cluster:
    """Cluster of a file's contents; `model` says what a token takes where memory is stated in tokens."""
    ranks = whole(values["ranks"], "ranks")
    node = whole(values.get("ranks_per_node") or ranks, "ranks_per_node")
    if ranks % node:
        raise UserError(f"ranks {ranks} is not a multiple of ranks_per_node {node}: list whole nodes only.")
    if values.get("memory_tokens") is not None:
        memory = model.memory(whole(values["memory_tokens"], "memory_tokens")) + model.bytes_per_token / 2  # no rounding down
    elif values.get("memory_mb") is not None:
        memory = number(values["memory_mb"], "memory_mb") * MEBIBYTE
    else:
        memory = number(values["memory"], "memory")
    plain: dict[str, Any] = {"ranks": ranks, "memory": memory, "links": _links(values["links"], ranks, node)}
    if values.get("all_to_all"):
        table = _mapping(values["all_to_all"], "all_to_all")
        plain["all_to_all"] = {whole(k, "all_to_all"): number(v, f"all_to_all.{k}") for k, v in table.items()}
    for name in ("speeds", "link_speeds"):
        if values.get(name):
            plain[name] = _per_rank(values[name], name, ranks, node)
    return Cluster.from_dict(plain)


def _links(links: Any, ranks: int, node: int) -> list[dict[str, float]]:
    if isinstance(links, list):
        found = []
        for level in links:
            _known(_mapping(level, "links"), ("span", *LINK), "links of the cluster file")
            if level.get("span") is None:
                raise UserError("A level of links has no span: give the number of consecutive ranks that it joins.")
            found.append({"span": whole(level["span"], "links.span"), **_link(level, "links")})
        return sorted(found, key=lambda level: level["span"])
    _known(_mapping(links, "links"), LEVELS, "links of the cluster file")
    needed = ("node",) if node == ranks else LEVELS if node > 1 else ("network",)
    for name in needed:
        if not links.get(name):
            raise UserError(f"links states no {name}: give links.{name} a bandwidth in bytes a second, and a latency.")
    spans = {"node": node, "network": ranks}
    for name in needed:
        _known(_mapping(links[name], f"links.{name}"), LINK, f"links.{name} of the cluster file")
    return [{"span": spans[name], **_link(links[name], f"links.{name}")} for name in needed]


def _link(level: Mapping[str, Any], where: str) -> dict[str, float]:
    if level.get("bandwidth") is None:
        raise UserError(f"{where} states no bandwidth: give the bytes a second that a rank receives.")
    return {
        "bandwidth": number(level["bandwidth"], f"{where}.bandwidth"),
        "latency": number(level.get("latency") or 0, f"{where}.latency"),
    }


def _per_rank(values: Any, name: str, ranks: int, node: int) -> list[float]:
    if not isinstance(values, list):
        raise UserError(f"{name} is {values!r}: give a list of numbers, one a rank or one a node.")
    found = [number(value, name) for value in values]
    return [value for value in found for _ in range(node)] if len(found) == ranks // node != ranks else found


def _known(values: Mapping[Any, Any], keys: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}."
            raise UserError(f"The key {key} in {where} is unknown: {remedy}")


def _mapping(values: Any, name: str) -> Mapping[Any, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{name} is {values!r}: give keys and values, as longhaul plan --help shows.")
    return values


def number(value: Any, name: str) -> float:
    """A finite number; YAML reads 30e9 as text, so text is tried too."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{name} is {value!r}: give a number.")
    return found


def whole(value: Any, name: str) -> int:
    """A whole number of at least 1."""
    found = number(value, name)
    if found != int(found) or found < 1:
        raise UserError(f"{name} is {value!r}: give a whole number of at least 1.")
    return int(found)


def read_lengths(path: Path) -> list[int]:
    """Numbers of a file, one a line; empty lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--lengths {path} cannot be read ({error.strerror}): give a file with one number a line.") from None
    except UnicodeDecodeError:
        raise UserError(f"--lengths {path} is not text: give a file with one number a line.") from None
    lengths = []
    for place, line in enumerate(lines, 1):
        if text := line.strip():
            if not text.isdecimal() or int(text) < 1:
                raise UserError(f"Line {place} of --lengths {path} is {text[:40]!r}: give a document's tokens, a number above 0.")
            lengths.append(int(text))
    if not lengths:
        raise UserError(f"--lengths {path} holds no number: write the tokens of one document a line.")
    return lengths


def dataset_lengths(config: DataConfig) -> list[int]:
    """Tokens of the documents that training reads, in the order of its first epoch."""
    corpus = open_corpus(
        config.paths,
        config.text_field,
        open_tokenizer(config.tokenizer),
        on_bad_document=config.on_bad_document,
        cache_dir=config.cache_dir,
    )
    train, _ = split_corpus(corpus, config.validation_fraction, config.seed)
    lengths: list[int] = np.asarray(train.lengths)[shuffled(len(train), config.seed, 0)].tolist()
    return lengths
