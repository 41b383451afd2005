"""The least that a limit can need: sums over layers, and a maximum over them. Pure; knows no blocks and no solver."""

import math
from collections.abc import Sequence


def least_total(
    fixed: float, costs: Sequence[Sequence[float]], peaks: Sequence[Sequence[float]] | None = None
) -> float:
    """Return the smallest `fixed + sum of costs + largest peak` of any choice of one candidate per layer.

    A sum separates over layers. With peaks it does once the largest is held to a cap, and only values of some
    candidate's peak need be tried as one.
    """
    if peaks is None:
        return fixed + math.fsum(map(min, costs))
    needs = [list(zip(layer, tops, strict=True)) for layer, tops in zip(costs, peaks, strict=True)]
    highest_of_lowest = max(min(tops) for tops in peaks)  # below this cap some layer has no candidate
    caps = {top for tops in peaks for top in tops if top >= highest_of_lowest}
    return fixed + min(
        cap + math.fsum(min(cost for cost, top in layer if top <= cap) for layer in needs) for cap in caps
    )
