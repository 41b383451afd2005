"""Reasoning on demand: verifiable tasks, traces, the toggle dataset, rewards, rollouts, GRPO."""
