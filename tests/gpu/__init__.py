"""Tests that need a GPU; all are skipped where there is none."""
