"""Everything that knows about ranks: groups, layouts, exchanges and attention engines."""
