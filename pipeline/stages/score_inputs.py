"""What scoring stages measure, read from their inputs: text always, a task where the recipe names one."""

from pipeline.data.evaluation_sets import load_search_task
from pipeline.data.packed import load_packed
from pipeline.model.checkpoint import load_tokenizer
from pipeline.puzzle.score_functions import DivergenceScore, ScoreFunction, TaskScore
from pipeline.recipe import MultipleChoiceSet
from pipeline.stage import StageInputs


def score_functions(
    inputs: StageInputs, *, tokens: int, task: MultipleChoiceSet | None, part: int = 0
) -> tuple[ScoreFunction, ...]:
    """Return the functions on the first validation tokens of the mixture, or a later part, and on the task's items."""
    packed = load_packed(inputs["distillation_mix"], "validation").take(tokens, part=part)
    divergence = DivergenceScore(packed=packed)
    if task is None:
        return (divergence,)
    items = load_search_task(inputs["evaluation_sets"])
    tokenizer = load_tokenizer(inputs["parent_checkpoint"])
    return divergence, TaskScore.of(items, tokenizer=tokenizer, max_tokens=packed.sequence_length)
