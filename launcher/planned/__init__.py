"""Training steps that are planned one by one: `parallel.planner.enabled`."""
