"""What every test of Longhaul shares: ranks, error measure, awkward inputs, poisoned memory."""

from .pool import BACKENDS, RankError, RankTimeout, backends, close_pools, run_ranks

__all__ = ["BACKENDS", "RankError", "RankTimeout", "backends", "close_pools", "run_ranks"]
