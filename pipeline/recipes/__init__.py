"""Recipes as strict YAML, one file per experiment."""
