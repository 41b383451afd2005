"""The shell: graph, metadata, schedule, run hygiene, and the real command line."""
