"""Tests: they mirror the repository, and make whatever they need."""
