"""Measures of a checkpoint: perplexity, KL to the parent, tasks, toggle compliance, speed."""
