"""The command `longhaul plan`: read lengths, a cluster and a model; plan a step; show, compare, advise."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from longhaul.launcher.config import TrainConfig
from longhaul.launcher.parsing import parse
from longhaul.models.errors import UserError
from longhaul.parallel.planner import Cluster, CostModel, plan
from longhaul.parallel.planner.cost import PUBLISHED
from longhaul.parallel.planner.milp import solver_name
from longhaul.parallel.planner.plan import DEFAULT_BUDGET

from . import explain, picture
from .advice import advise
from .compare import solve, static_times
from .inputs import CLUSTER_HELP, dataset_lengths, make_cluster, read_cluster, read_lengths, whole

LEAST_CAP = 256  # tokens; hardly any document of the synthetic mix is shorter
DOCUMENTS = 512  # of a step, if nothing is said
STATE_ENGINES = ("all_gather", "scan", "ring")

MakeModel = Callable[[str | None], CostModel]  # engine of linear layers, None: the run's -> cost model


@dataclass(frozen=True)
class Inputs:
    """What a plan is made of, and how to ask for another engine of the linear layers."""

    lengths: list[int]
    cluster: Cluster
    model: CostModel
    make: MakeModel


def main(argv: Sequence[str]) -> int:
    """Plan one step and explain it; or `calibrate`, or predict `memory`."""
    if argv and argv[0] == "calibrate":
        from .calibrate_cli import main as calibrate

        return calibrate(argv[1:])
    if argv and argv[0] == "memory":
        from .memory_cli import main as memory

        return memory(argv[1:])
    options, rest = _parser().parse_known_args(list(argv))
    if options.exact:
        solver_name()  # before anything takes time
    inputs = _inputs(options, rest)
    lengths, cluster, model = inputs.lengths, inputs.cluster, inputs.model
    made = plan(lengths, cluster, model, options.budget, options.max_length)
    static = static_times(lengths, cluster, model, options.max_length)
    solved = solve(lengths, cluster, model, made, options.nodes) if options.exact else None
    now = {layer.engine for layer in model.layers if layer.kind == "linear"}
    others = [(name, inputs.make(name)) for name in STATE_ENGINES if now and name not in now]
    advice = advise(lengths, cluster, model, made, static, others, options.budget)
    title = f"{len(lengths):,} documents, {sum(lengths):,} tokens, {cluster.ranks} ranks"
    if options.png:
        picture.save_png(made, cluster.ranks, options.png, f"{title}: {made.time:.4g} s, {made.idle:.1%} waiting")
    if options.json:
        beside = {"lengths": lengths, "ranks": cluster.ranks, "static": asdict(static) | {"best": static.best}}
        solution = None if solved is None else asdict(solved)
        print(json.dumps({"plan": explain.as_dict(made), **beside, "exact": solution, "advice": advice}, indent=1))
        return 0
    console = Console()
    console.print(f"{title}; a rank holds {model.tokens_per_rank(cluster):,} tokens", highlight=False)
    console.print()
    picture.draw(made, cluster.ranks, console)
    console.print()
    explain.show(made, lengths, cluster.ranks, static, solved, console)
    console.print("\nWhat to change:", highlight=False)
    for sentence in advice:
        console.print(f"- {sentence}", highlight=False, markup=False)
    return 0


def _inputs(options: argparse.Namespace, rest: Sequence[str]) -> Inputs:
    if options.cluster is None:
        raise UserError("No cluster is named: give --cluster FILE.yaml, or --cluster a100_64, which is shipped.")
    if options.config is None and options.published is None:
        raise UserError("No model is named: give --config FILE.yaml of a run, or --published 7B.")
    _check(options)
    values = read_cluster(options.cluster)
    given = ["--config", str(options.config)] if options.config else []
    config = parse([*given, *rest], "longhaul plan") if given or rest else None
    make = _model_maker(options, config, values)
    model = make(options.linear_engine)
    return Inputs(_lengths(options, config), make_cluster(values, model), model, make)


def _check(options: argparse.Namespace) -> None:
    for name, least in (("documents", 1), ("budget", 1), ("nodes", 1), ("seed", 0), ("max_length", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give {least} or more.")
    for one, other in (("published", "calibration"), ("lengths", "synthetic")):
        if getattr(options, one) and getattr(options, other):
            raise UserError(f"--{one} and --{other} exclude each other: leave one out.")
    if options.synthetic and 0 < options.max_length < LEAST_CAP:
        raise UserError(f"--max-length is {options.max_length}: the synthetic mix needs {LEAST_CAP} or more.")


def _model_maker(options: argparse.Namespace, config: TrainConfig | None, values: dict[str, object]) -> MakeModel:
    # Here, because torch takes seconds to import and published constants need none of it.
    from .calibrate import read_calibration
    from .census import facts_of
    from .costs import check_engines, cost_model, published_constants, published_model

    check_engines(options.linear_engine, options.softmax_engine)
    if options.published is not None:
        letters = config.model.layers.replace("-", "") if config else "N"
        share = sum(letter in "N*" for letter in letters) / len(letters) if letters else 1.0
        return lambda engine: published_model(options.published, share, engine or options.linear_engine, options.objective)
    assert config is not None, "a model is named"
    constants = read_calibration(options.calibration) if options.calibration else published_constants()
    facts = facts_of(config.model)
    ranks = whole(values["ranks"], "ranks")
    return lambda engine: cost_model(
        facts, config, constants, ranks, engine or options.linear_engine, options.softmax_engine, options.objective
    )


def _lengths(options: argparse.Namespace, config: TrainConfig | None) -> list[int]:
    if options.lengths is not None:
        lengths = read_lengths(options.lengths)
        return lengths[: options.documents or len(lengths)]
    if options.synthetic:
        from longhaul.launcher.bench.plan_quality import lengths_of

        return lengths_of(options.seed, options.max_length or 192 * 1024, options.documents or DOCUMENTS)
    if config is None:
        raise UserError("No documents are named: give --lengths FILE, --synthetic, or --config with a data section.")
    return dataset_lengths(config.data)[: options.documents or DOCUMENTS]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "longhaul plan",
        description="Plan one step of documents of uneven length, show it, compare it with static degrees, say what to change.\n"
        "Flags of longhaul train (--model.pattern L) are understood. Constants of this machine: longhaul plan calibrate.",
        epilog=CLUSTER_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cluster", metavar="FILE", help="YAML as below, or the name of a shipped one: a100_64")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a run's configuration: its model, engines and data")
    parser.add_argument("--published", choices=list(PUBLISHED), help="published constants (A100) instead of the model's size")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="of longhaul plan calibrate (default: published constants)"
    )
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="one number a line, instead of the run's documents")
    parser.add_argument("--synthetic", action="store_true", help="a long-tailed mix instead of the run's documents")
    parser.add_argument("--seed", type=int, default=1, help="of the synthetic mix (default: %(default)s)")
    parser.add_argument("--documents", type=int, metavar="N", help=f"of one step (default: {DOCUMENTS}; --lengths: all)")
    parser.add_argument("--max-length", type=int, default=0, metavar="TOKENS", help="longest document the job may meet")
    parser.add_argument("--linear-engine", metavar="NAME", help="all_gather, scan, ring or head_split (default: the run's)")
    parser.add_argument("--softmax-engine", metavar="NAME", help="head_split, ring or all_gather (default: the run's)")
    parser.add_argument("--objective", choices=("sum", "split"), default="sum", help="split: a barrier between kinds of layer")
    parser.add_argument("--budget", type=int, default=DEFAULT_BUDGET, help="work of the planner (default: %(default)s)")
    parser.add_argument("--exact", action="store_true", help="with a solver: a tighter bound, and small steps by MILP")
    parser.add_argument("--nodes", type=int, default=2000, help="limit of the published program (default: %(default)s)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the plan to scale")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    return parser
