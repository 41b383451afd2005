"""One checkpoint through the harness: every batch that it announces is run, and no other."""

import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.benchmarks import MultipleChoiceItem
from pipeline.data.reasoning_items import generate_items
from pipeline.evaluation.suite import OTHER_FAMILY, Suite, evaluate_checkpoint, text_windows
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.progress import SilentReporter
from pipeline.recipe import SampledConfig
from tests.pipeline.data.builders import llama3_tokenizer
from tests.pipeline.evaluation.stages import CONFIG, INSTRUCTED, OTHER_TASK, TASK


class _Recorder(SilentReporter):
    """Keeps every step and its total."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def step(self, step: int, total: int, /, *, what: str, **metrics: float) -> None:
        self.steps.append((step, total))


def test_evaluate_checkpoint_takes_as_many_batches_as_it_announces(
    parent: HeterogeneousLlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
):
    # 6 samples of an item are one batch although batch_size is 4; by rows, 18 would be 5 batches instead of 3.
    sampled = SampledConfig(num_items=3, num_samples=6, temperature=0.6, top_p=0.95)
    suite = Suite(
        config=CONFIG.evaluation.model_copy(update={"sampled": sampled}),
        tokenizer=tokenizer,
        windows={"prose": torch.arange(5 * 32).reshape(5, 32)},
        multiple_choice={"quiz": [MultipleChoiceItem(prompt="1 + 1 =", choices=("2", "three", "4"), gold=0)] * 2},
        reasoning=generate_items(TASK, num_items=5, seed=5, exclude_questions=frozenset()),
        held_out_tasks={OTHER_FAMILY: generate_items(OTHER_TASK, num_items=2, seed=5, exclude_questions=frozenset())},
        instructions=INSTRUCTED,
    )
    reporter = _Recorder()
    evaluate_checkpoint(parent, name="parent", suite=suite, parent=None, reporter=reporter)
    assert reporter.steps == [(step, suite.num_batches) for step in range(1, suite.num_batches + 1)]


def test_held_out_documents_begin_and_end_as_documents_of_a_mixture_do():
    tokenizer = llama3_tokenizer()
    (window_T,) = text_windows(["ab", "c"], tokenizer, sequence_length=6, max_tokens=6).tolist()
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    assert tokenizer.convert_ids_to_tokens(window_T) == [begin, "a", "b", end, begin, "c", end]
