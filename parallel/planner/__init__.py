"""Plans for steps whose documents differ in length: which documents run together, on which ranks, cut where.

Pure numpy; `milp` needs a solver. Nothing here imports torch.
"""

from longhaul.parallel.planner.cluster import Cluster, Link
from longhaul.parallel.planner.cost import CostModel, LayerCost, published
from longhaul.parallel.planner.plan import GroupPlan, MicroBatch, Plan, plan

__all__ = ["Cluster", "CostModel", "GroupPlan", "LayerCost", "Link", "MicroBatch", "Plan", "plan", "published"]
