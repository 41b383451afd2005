"""Tests of pipeline.data and its stages."""
