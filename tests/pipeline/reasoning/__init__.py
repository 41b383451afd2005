"""Tests of pipeline.reasoning."""
