"""What the evaluation of one checkpoint says, as frozen models that are written to evaluation.json. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from pipeline.architecture import Frozen
from pipeline.artifacts import write_atomically
from pipeline.evaluation.intervals import Estimate
from pipeline.recipe import Precision

EVALUATION_FILE = "evaluation.json"

# The order in which checkpoints come into being; reports and tables keep it.
CHECKPOINTS = ("parent", "child", "fused", "kd", "cpt", "sft", "rl")

Mode = Literal["on", "off"]


class TextQuality(Frozen):
    """One text set (or all of them), by windows of text: the intervals are over windows."""

    num_tokens: int
    perplexity: Estimate
    kl_nats_per_token: Estimate
    top1_agreement: Estimate


class MultipleChoiceQuality(Frozen):
    """One multiple-choice set: by summed log-likelihood, and by log-likelihood per character of the choice."""

    accuracy: Estimate
    accuracy_normalised: Estimate
    chance: float


class ModeQuality(Frozen):
    """Greedy answers in one reasoning mode."""

    answer_found: Estimate = Field(description="the right answer can be taken from the reply by a fixed rule")
    answer_found_by_task: dict[str, Estimate]
    exact_reply: Estimate = Field(description="what stands after the thought is the right answer and nothing else")
    toggle_compliance: Estimate
    mean_tokens: float
    num_truncated: int = Field(description="answers that reached max_new_tokens before an end token")
    num_empty: int
    max_new_tokens: int


class BothModes(Frozen):
    """Greedy answers to one group of tasks with thinking on and off."""

    thinking_on: ModeQuality
    thinking_off: ModeQuality


class InstructionQuality(Frozen):
    """Greedy replies to requests with verifiable instructions in one mode; every interval is over prompts."""

    prompt_strict: Estimate = Field(description="share of prompts whose instructions are all followed")
    prompt_loose: Estimate
    instruction_strict: Estimate = Field(description="share of instructions that are followed")
    instruction_loose: Estimate
    num_instructions: int


class PromptRobustness(Frozen):
    """Greedy replies under one unusual system prompt."""

    variant: str
    wanted: Literal["on", "off", "either"]
    thinks: Estimate = Field(description="one well-formed thought and an answer")
    answers_at_once: Estimate = Field(description="an answer and no tag")


class SampledQuality(Frozen):
    """Several samples of each question, thinking on."""

    pass_at_1: Estimate
    share_compliant: float
    mean_tokens: float
    num_samples: int
    temperature: float
    top_p: float


class ChainHealth(Frozen):
    """Greedy replies with thinking on, as texts."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    num_words: Estimate
    repeated_share: Estimate
    looping: Estimate
    self_bleu: float


class SampleAnswer(Frozen):
    """One question with the checkpoint's own answers, as generated."""

    task: str
    question: str
    reference: str
    thinking_on: str
    thinking_off: str


class CheckpointEvaluation(Frozen):
    """Everything one harness measured on one checkpoint."""

    harness_version: int
    precision: Precision
    template_sha256: str
    num_parameters: int
    text_overall: TextQuality
    text: dict[str, TextQuality]
    multiple_choice: dict[str, MultipleChoiceQuality]
    thinking_on: ModeQuality
    thinking_off: ModeQuality
    held_out_tasks: dict[str, BothModes]
    instructions: dict[Mode, InstructionQuality] = Field(description="by mode; empty where none are asked")
    robustness: tuple[PromptRobustness, ...]
    sampled: SampledQuality | None
    chains: ChainHealth
    samples: tuple[SampleAnswer, ...]

    def mode(self, name: Mode) -> ModeQuality:
        """Return the quality of one reasoning mode."""
        return self.thinking_on if name == "on" else self.thinking_off


class EvaluationSet(Frozen):
    """The content of evaluation.json: checkpoints by name, in the order of CHECKPOINTS."""

    # As in Estimate: pydantic asks the outermost model as well as the one that holds the number.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    checkpoints: dict[str, CheckpointEvaluation]


def write_evaluations(directory: Path, *, checkpoints: Mapping[str, CheckpointEvaluation]) -> None:
    """Write evaluation.json."""
    text = EvaluationSet(checkpoints=dict(checkpoints)).model_dump_json(indent=1)
    write_atomically(directory / EVALUATION_FILE, text.encode())


def read_evaluations(directory: Path) -> dict[str, CheckpointEvaluation]:
    """Read evaluation.json."""
    return EvaluationSet.model_validate_json((directory / EVALUATION_FILE).read_bytes()).checkpoints
