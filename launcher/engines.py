"""From the keys of `parallel` to the engines: which option goes where, refused where the chosen engine has no use for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from longhaul.models.errors import UserError
from longhaul.parallel.attention.registry import ENGINES
from longhaul.parallel.comm import Comm
from longhaul.parallel.engine import SequenceParallel
from longhaul.parallel.exchange.registry import EXCHANGES
from longhaul.parallel.layout import LAYOUTS, SequenceLayout

if TYPE_CHECKING:
    from .metrics import Metrics
    from .parallel_config import ParallelConfig


class Key(NamedTuple):
    """A key of `parallel`: the key that chooses the engine, and the engine's own name for the option."""

    chooses: str
    option: str


KEYS = {
    "exchange_payload": Key("exchange", "payload_dtype"),
    "exchange_blocks": Key("exchange", "blocks"),
    "exchange_inside": Key("exchange", "inside"),
    "exchange_across": Key("exchange", "across"),
    "auto_latency": Key("exchange", "latency_s"),
    "auto_bandwidth": Key("exchange", "bytes_per_s"),
    "auto_local_time": Key("exchange", "local_s_per_token"),
    "reach_tolerance": Key("exchange", "reach_tolerance"),
    "attention_head_slices": Key("attention", "head_slices"),
    "attention_backward": Key("attention", "backward"),
    "layout_stripe": Key("layout", "block"),
    "layout_shares": Key("layout", "shares"),
}
PAYLOADS = {"fp32": "float32", "bf16": "bfloat16"}
PRINTED = 24  # lines on what engines chose
DEFAULTS = {"exchange_payload": "fp32", "attention_backward": "auto"}  # of the others None


def engine_arguments(parallel: ParallelConfig) -> dict[str, Any]:
    """What `SequenceParallel` is made with, beside its groups."""
    found: dict[str, Any] = {name: getattr(parallel, name) for name in ("exchange", "attention", "layout")}
    for name in ("exchange", "attention", "layout"):
        found[f"{name}_options"] = {
            key.option: PAYLOADS[value] if option == "exchange_payload" else value
            for option, key in KEYS.items()
            if key.chooses == name and (value := getattr(parallel, option)) != DEFAULTS.get(option)
        }
    return found


def check_engines(parallel: ParallelConfig) -> None:
    """Refuse an engine that does not exist, and an option that the chosen one has not or cannot serve.

    Raises:
        UserError: with the key, the value and the remedy.
    """
    # Engines of one process take the same options as those of many.
    arguments, alone = engine_arguments(parallel), Comm(None)
    plain = {name: value for name, value in arguments.items() if not name.endswith("_options")}
    SequenceParallel(alone, **plain, levels=(alone, alone))
    for name, key in KEYS.items():
        value = getattr(parallel, name)
        if value == DEFAULTS.get(name):
            continue
        chosen = getattr(parallel, key.chooses)
        takers = [engine for engine in _factories(key.chooses) if key.option in _options(key.chooses, engine)]
        if chosen not in takers:
            raise UserError(
                f"parallel.{name} is {value}, but parallel.{key.chooses} {chosen} has no use for it: leave it out, or use "
                f"{' or '.join(takers)}."
            )
    try:
        SequenceParallel(alone, **arguments, levels=(alone, alone))
    except UserError as mistake:
        error: UserError | None = mistake
        if arguments["exchange_options"].pop("payload_dtype", None) is not None:
            error = None  # unless something is wrong without it, too
            try:
                SequenceParallel(alone, **arguments, levels=(alone, alone))
            except UserError as other:
                error = other
        if error is None:
            raise UserError(
                f"parallel.exchange_payload {parallel.exchange_payload} would round the running state of exchange "
                f"{parallel.exchange} at every process: use fp32, or the exchange all_gather."
            ) from mistake
        given = [name for name in KEYS if getattr(parallel, name) != DEFAULTS.get(name)]
        named = ", ".join(f"parallel.{name} {getattr(parallel, name)}" for name in given)
        raise UserError(str(error) if any(name in str(error) for name in given) else f"{named}: {error}") from error
    shares = parallel.layout_shares
    if shares is not None and len(shares) != parallel.sequence_parallel_size:
        raise UserError(
            f"parallel.layout_shares gives {len(shares)} shares for parallel.sequence_parallel_size "
            f"{parallel.sequence_parallel_size}: give one a process."
        )
    if arguments["layout_options"]:
        SequenceLayout.make(parallel.layout, 1, parallel.sequence_parallel_size, **arguments["layout_options"])


def _factories(chooses: str) -> Mapping[str, Callable[..., Any]]:
    factories: dict[str, Mapping[str, Callable[..., Any]]] = {
        "exchange": EXCHANGES,
        "attention": ENGINES,
        "layout": {name: kind.cut for name, kind in LAYOUTS.items()},
    }
    return factories[chooses]


def _options(chooses: str, engine: str) -> list[str]:
    """Of an engine; every exchange but one has a reach that may be cut, and that one says so itself."""
    own = list(inspect.signature(_factories(chooses)[engine]).parameters)
    return [*own, "reach_tolerance"] if chooses == "exchange" else own


class EngineNews:
    """Prints, and records for the report, what the engines measured, chose and gave up, when there is something new.

    Args:
        engine: of this run.
        metrics: where it is printed and recorded.
    """

    def __init__(self, engine: SequenceParallel, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self.told: list[str] = []
        self.printed = 0

    def tell(self) -> None:
        """Ask the engines. Lines beyond `PRINTED` are only recorded: documents of many shapes give many choices."""
        said = self.engine.describe()
        if said == self.told:
            return
        for line in said:
            if line not in self.told and self.printed < PRINTED:
                self.metrics.message(line)
                self.printed += 1
        self.told = said
        self.metrics.record(engines=said)
