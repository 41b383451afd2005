"""Puzzle: search space, importance, block-wise local distillation, scores, profile, MIP, assembly."""
