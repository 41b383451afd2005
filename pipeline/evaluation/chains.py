"""The health of long chains of thought: how long they are, how much they repeat, how alike they are. Pure, no torch.

Pruning shows here before it shows in accuracy: chains loop, or all become the same text.
Source: self-BLEU after Zhu et al. 2018 (Texygen); BLEU-4 after Papineni et al. 2002 with add-one smoothing above
unigrams (Lin and Och 2004).
"""

import math
from collections import Counter
from collections.abc import Sequence

from pipeline.data.repetition import repeated_share
from pipeline.evaluation.intervals import Estimate, share, weighted_mean
from pipeline.evaluation.results import ChainHealth

REPEATED_WORDS = 8
MAX_REPEATED_SHARE = 0.3
# Self-BLEU compares every chain with every other.
MAX_COMPARED = 32

_MAX_ORDER = 4


def chain_health(texts: Sequence[str]) -> ChainHealth:
    """Return the health of chains, given as the replies with thinking on; replies without words are left out."""
    chains = [text.split() for text in texts if text.split()]
    if not chains:
        nothing = Estimate(value=0.0, low=0.0, high=0.0, num_samples=0)
        return ChainHealth(num_words=nothing, repeated_share=nothing, looping=nothing, self_bleu=math.nan)
    repeated = [repeated_share(chain, num_words=REPEATED_WORDS) for chain in chains]
    return ChainHealth(
        num_words=weighted_mean([[(float(len(chain)), 1.0) for chain in chains]]),
        repeated_share=share(sum(repeated), num_samples=len(chains)),
        looping=share(sum(value > MAX_REPEATED_SHARE for value in repeated), num_samples=len(chains)),
        self_bleu=self_bleu(chains[:MAX_COMPARED]),
    )


def self_bleu(chains: Sequence[Sequence[str]]) -> float:
    """Return the mean BLEU-4 of each chain against all others: 1 when all are equal, NaN for fewer than 2."""
    if len(chains) < 2:
        return math.nan
    counts = [[_ngrams(chain, order) for order in range(1, _MAX_ORDER + 1)] for chain in chains]
    scores = []
    for place, chain in enumerate(chains):
        others = [number for number in range(len(chains)) if number != place]
        log_precision = 0.0
        for order in range(_MAX_ORDER):
            most = Counter[tuple[str, ...]]()
            for other in others:
                most |= counts[other][order]
            matched = sum((counts[place][order] & most).values())
            total = sum(counts[place][order].values())
            smoothing = 0 if order == 0 else 1
            if matched + smoothing == 0 or total + smoothing == 0:
                log_precision = -math.inf
                break
            log_precision += math.log((matched + smoothing) / (total + smoothing)) / _MAX_ORDER
        closest = min((len(chains[other]) for other in others), key=lambda length: (abs(length - len(chain)), length))
        scores.append(math.exp(min(0.0, 1 - closest / len(chain)) + log_precision))
    return sum(scores) / len(scores)


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
