"""Rows and configurations of reasoning data, whole but for what a test is about."""

from typing import Any, Literal

from pipeline.data.chat import THINKING_OFF, THINKING_ON
from pipeline.data.reasoning_items import ReasoningItem
from pipeline.reasoning.rows import Mode, TraceRow
from pipeline.recipe import (
    BlendConfig,
    ChatConfig,
    EndpointTraces,
    FiltersConfig,
    ImportedTraces,
    NearDuplicatesConfig,
    RepetitionConfig,
    ToggleDatasetConfig,
    TracesConfig,
    VoteConfig,
)

FILTERS = FiltersConfig(
    licences=("Apache-2.0", "MIT", "CC-BY-4.0"),
    languages=("en",),
    max_prompt_tokens=300,
    max_output_tokens=384,
    repetition=RepetitionConfig(ngram_words=4, max_share=0.5),
    near_duplicates=NearDuplicatesConfig(shingle_words=3, min_jaccard=0.7),
    vote=VoteConfig(min_samples=3, min_share=0.6),
    verifier_timeout_s=10.0,
    require_pairs=True,
)
NO_CHAT = ChatConfig(num_samples=0, max_new_tokens=8, temperature=1.0, top_p=0.9, batch_size=4)
ALL = BlendConfig(name="all", modes=("thinking_on", "thinking_off", "unset"), weights={}, order="shuffled")


def toggle_config(filters: FiltersConfig, *blends: BlendConfig) -> ToggleDatasetConfig:
    return ToggleDatasetConfig(sequence_length=384, filters=filters, blends=blends or (ALL,), seed=3)


def traces_config(
    *,
    items_per_task: int = 1,
    chat: ChatConfig = NO_CHAT,
    endpoints: tuple[EndpointTraces, ...] = (),
    imports: tuple[ImportedTraces, ...] = (),
) -> TracesConfig:
    return TracesConfig(items_per_task=items_per_task, chat=chat, endpoints=endpoints, imports=imports, seed=3)


def make_row(
    *,
    question: str = "What is two and three?",
    output: str = "<think>\n2 + 3 = 5\n</think>\n\n5",
    mode: Mode = "on",
    category: str = "math",
    truth: Literal["task", "reference", "majority", "trusted"] = "trusted",
    reference: str | None = None,
    item: ReasoningItem | None = None,
    history: tuple[tuple[str, str], ...] = (),
    **changes: Any,
) -> TraceRow:
    values: dict[str, Any] = {
        "input": (*history, ("user", question)),
        "output": output,
        "reasoning": "on" if mode == "on" else "off",
        "system_prompt": {"on": THINKING_ON, "off": THINKING_OFF, "none": ""}[mode],
        "category": category,
        "license": "MIT",
        "generator": "someone",
        "version": "v1",
        "source": "test",
        "task": category,
        "truth": "task" if item is not None else truth,
        "reference": reference,
        "item": item,
    }
    return TraceRow(**(values | changes))
