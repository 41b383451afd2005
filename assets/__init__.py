"""What exists: thin Dagster assets, one file per asset, no logic."""
