"""YAML configurations that ship with the package."""
