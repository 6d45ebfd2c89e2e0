"""Mathematics of sequence models: modules that never ask whether they run in parallel."""
