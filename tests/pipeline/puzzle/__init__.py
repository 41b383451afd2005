"""Tests of pipeline.puzzle."""
