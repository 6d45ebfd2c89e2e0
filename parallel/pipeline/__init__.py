"""Pipeline parallelism: processes that hold different layers of a model."""
