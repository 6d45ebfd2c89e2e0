"""Clusters for `longhaul plan --cluster NAME`."""
