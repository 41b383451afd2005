"""The Llama-Nemotron recipe as a plain Python library; only pipeline.definitions knows Dagster."""
