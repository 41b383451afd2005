"""Exported children in the runtimes that serve them, each installed apart: `make test-serving`."""
