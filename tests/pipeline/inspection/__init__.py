"""Tests of pipeline.inspection."""
