"""Hostile and broken input, through the command that a user runs: one clear error each, and nothing half-written."""
