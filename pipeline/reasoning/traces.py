"""Step-by-step traces for reasoning items: which task has a solver, and the rule that a trace must verify."""

from pipeline.data.reasoning_items import ReasoningItem, regenerate_entry, score_answer
from pipeline.errors import RecipeError
from pipeline.reasoning.solvers import arithmetic, lists, words
from pipeline.reasoning.solvers.trace import Solver, Trace

SOLVERS: dict[str, Solver] = {
    "chain_sum": arithmetic.chain_sum,
    "products": arithmetic.products,
    "gcd": arithmetic.gcd,
    "lcm": arithmetic.lcm,
    "leg_counting": arithmetic.leg_counting,
    "count_bits": arithmetic.count_bits,
    "prime_factorization": arithmetic.prime_factorization,
    "simple_equations": arithmetic.simple_equations,
    "letter_counting": words.letter_counting,
    "spell_backward": words.spell_backward,
    "word_sequence_reversal": words.word_sequence_reversal,
    "word_sorting": words.word_sorting,
    "number_filtering": lists.number_filtering,
    "number_sorting": lists.number_sorting,
}


def write_trace(item: ReasoningItem) -> Trace | None:
    """Solve an item in steps; None when its solver does not cover it.

    The solver sees the item's data, not its answer, so `verifies` is a test of the trace and not a tautology.

    Raises:
        RecipeError: when the task has no solver.
    """
    if item.task not in SOLVERS:
        raise RecipeError(
            f"reasoning task {item.task} has no solver to write traces for it; those that have are "
            f"{', '.join(sorted(SOLVERS))}"
        )
    return SOLVERS[item.task](regenerate_entry(item)["metadata"])


def verifies(trace: Trace, item: ReasoningItem) -> bool:
    """Return whether the task's own scorer gives the trace's answer full marks."""
    return score_answer(item, trace.answer) == 1.0
