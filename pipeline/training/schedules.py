"""Learning-rate schedules as pure functions of the step."""

import math

from pipeline.recipe import OptimizerConfig


def learning_rate_factor(step: int, *, total_steps: int, optimizer: OptimizerConfig) -> float:
    """Return the factor on the learning rate at `step`, counted from 0.

    With W = ceil(warmup_ratio * total_steps), m = min_learning_rate_ratio and s the step:

        warm-up      s < W:      (s + 1) / W
        constant     s >= W:     1
        cosine       s >= W:     m + (1 - m) * (1 + cos(pi * (s - W) / (total_steps - W))) / 2
    """
    warmup_steps = math.ceil(optimizer.warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if optimizer.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    floor = optimizer.min_learning_rate_ratio
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
