"""What a run says about itself: a line a step, metrics files and the facts that the report is made of."""

from .config import MetricsConfig
from .metrics import Metrics, traffic_of

__all__ = ["Metrics", "MetricsConfig", "traffic_of"]
