"""Dagster's UI in a real browser: what a person clicks and reads. Nothing here asks GraphQL."""
