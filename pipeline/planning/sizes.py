"""How large the parent and its possible children are: parameters, bytes and FLOPs per token. Pure, closed form."""

from dataclasses import dataclass

from pipeline.architecture import Architecture, BlockSpec
from pipeline.costs import (
    block_parameters,
    embedding_parameters,
    forward_flops_per_token,
    kv_values_per_token,
    num_parameters,
)
from pipeline.planning.ranges import Range
from pipeline.puzzle.search_space import SearchSpace, pinned_blocks, resolve
from pipeline.recipe import Recipe, Target

_GUESSED_SHARE = 0.75  # of the way from the smallest child to the parent, where a target says nothing of size


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """A parent and the range of children that the search may return for a target."""

    parent: Architecture
    smallest: Architecture
    space: SearchSpace
    expected_share: float

    @property
    def parent_parameters(self) -> int:
        """Parameters of the parent."""
        return num_parameters(self.parent)

    @property
    def child_parameters(self) -> Range:
        """Parameters of the child: the smallest of the space, as the target suggests, the parent itself."""
        return self._between(num_parameters(self.smallest), self.parent_parameters)

    @property
    def head_flops(self) -> float:
        """Forward FLOPs of one token's logits."""
        return 2.0 * self.parent.vocab_size * self.parent.hidden_size

    def parent_flops(self, *, context_tokens: int, with_head: bool = True) -> float:
        """Forward FLOPs of the parent for each token that attends to that many; without head, up to its logits."""
        flops = forward_flops_per_token(self.parent, context_tokens=context_tokens)
        return flops if with_head else flops - self.head_flops

    def child_flops(self, *, context_tokens: int, with_head: bool = True) -> Range:
        """Forward FLOPs of the child for each token that attends to that many; without head, up to its logits."""
        least = forward_flops_per_token(self.smallest, context_tokens=context_tokens)
        return self._between(
            least if with_head else least - self.head_flops,
            self.parent_flops(context_tokens=context_tokens, with_head=with_head),
        )

    def _between(self, low: float, high: float) -> Range:
        return Range(low=low, expected=low + self.expected_share * (high - low), high=high)


def model_sizes(recipe: Recipe, target: Target, *, parent: Architecture) -> ModelSizes:
    """Return the sizes of a recipe's parent and of the children that a target may get.

    Raises:
        RecipeError: when the search space does not fit the parent, or the target's pins do not fit the search space.
    """
    space = resolve(recipe.search_space, parent)
    smallest = parent.with_blocks(_smallest_blocks(space, target=target, parent=parent))
    return ModelSizes(
        parent=parent,
        smallest=smallest,
        space=space,
        expected_share=_expected_share(target, parent=parent, smallest=smallest),
    )


def _smallest_blocks(space: SearchSpace, *, target: Target, parent: Architecture) -> list[BlockSpec]:
    return [
        min(
            blocks,
            key=lambda block: (block_parameters(parent, block), kv_values_per_token(parent, block.attention)),
        )
        for blocks in pinned_blocks(space, target.pins)
    ]


def _expected_share(target: Target, *, parent: Architecture, smallest: Architecture) -> float:
    """Return how far between the smallest child and the parent the target's limits put the child.

    A speed of s times the parent's leaves 1 / s of the time, hence about 1 / s of the weights outside the embeddings.
    """
    outside = embedding_parameters(parent)
    inside, least = num_parameters(parent) - outside, num_parameters(smallest) - outside
    wanted = []
    for limit in target.limits:
        if limit.quantity in ("decode_speed", "prefill_speed") and limit.relative_to == "parent" and limit.bound > 1:
            wanted.append(inside / limit.bound)
        elif limit.quantity == "latency_ms" and limit.relative_to == "parent":
            wanted.append(inside * limit.bound)
        elif limit.quantity == "num_parameters":
            bound = limit.bound * (inside + outside) if limit.relative_to == "parent" else limit.bound
            wanted.append(bound - outside)
    if inside == least:
        return 1.0
    if not wanted:
        return _GUESSED_SHARE
    return min(1.0, max(0.0, (min(wanted) - least) / (inside - least)))
