"""Tables of chains, unusual system prompts and what each stage changed: records by hand in, exact cells out."""

import math

from pipeline.evaluation.intervals import share
from pipeline.evaluation.results import ChainHealth, CheckpointEvaluation, ModeQuality, PromptRobustness, SampledQuality
from pipeline.report.evaluation_tables import bookends_table, chains_table, robustness_table
from pipeline.stage import Table
from tests.pipeline.report.builders import checkpoint_evaluation, estimate


def _cells(table: Table) -> list[dict[str, object]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def _mode(of: ModeQuality, *, num_right: int, num_compliant: int, mean_tokens: float) -> ModeQuality:
    changed = {
        "answer_found": share(num_right, num_samples=20),
        "toggle_compliance": share(num_compliant, num_samples=20),
        "mean_tokens": mean_tokens,
    }
    return of.model_copy(update=changed)


def _chains(self_bleu: float) -> ChainHealth:
    return ChainHealth(
        num_words=estimate(212.4, half_width=20.0, num_samples=7),
        repeated_share=estimate(0.125, half_width=0.025),
        looping=estimate(0.05, half_width=0.04),
        self_bleu=self_bleu,
    )


def _evaluations() -> dict[str, CheckpointEvaluation]:
    """Two checkpoints, the later first, in which no two measures are alike; the earlier was not sampled."""
    sft, rl = checkpoint_evaluation("sft"), checkpoint_evaluation("rl")
    before = sft.model_copy(
        update={
            "thinking_on": _mode(sft.thinking_on, num_right=3, num_compliant=18, mean_tokens=41.5),
            "thinking_off": _mode(sft.thinking_off, num_right=5, num_compliant=20, mean_tokens=7.0),
            "sampled": None,
            "chains": _chains(math.nan),
        }
    )
    sampled = SampledQuality(
        pass_at_1=estimate(0.45, half_width=0.1, num_samples=16),
        share_compliant=0.9,
        mean_tokens=40.0,
        num_samples=4,
        temperature=0.6,
        top_p=0.95,
    )
    after = rl.model_copy(
        update={
            "thinking_on": _mode(rl.thinking_on, num_right=8, num_compliant=19, mean_tokens=523.4),
            "thinking_off": _mode(rl.thinking_off, num_right=6, num_compliant=17, mean_tokens=8.0),
            "sampled": sampled,
            "chains": _chains(0.3125),
        }
    )
    return {"rl": after, "sft": before}


def test_bookends_table_holds_every_measure_before_and_after_each_stage():
    evaluations = {**_evaluations(), "parent": checkpoint_evaluation("parent")}
    first, last = _cells(bookends_table(evaluations))
    assert last == {
        "stage": "after reinforcement learning (final)",
        "perplexity": "35 > 35.5",
        "KL to parent, nats/token": "0.35 > 0.355",
        "right, on": "15% > 40%",
        "right, off": "25% > 30%",
        "pass@1, on": "- > 45%",
        "obeys, on": "90% > 95%",
        "obeys, off": "100% > 85%",
        "tokens, on": "41.5 > 523",
        "self-BLEU": "- > 0.312",
    }
    # The stages between the parent and this one were not measured.
    assert (first["stage"], first["perplexity"]) == ("after supervised fine-tuning", "29 > 35")
    assert bookends_table({"parent": evaluations["parent"]}).rows == ()


def test_chains_table_holds_samples_and_the_health_of_chains():
    before, after = _cells(chains_table(_evaluations()))
    health = {
        "words a reply, on": "212 [192, 232]",
        "repeated": "12.5% [10.0%, 15.0%]",
        "looping": "5.0% [1.0%, 9.0%]",
        "n (replies)": 7,
    }
    assert before == health | {
        "checkpoint": "after supervised fine-tuning",
        "pass@1, on": "-",
        "items x samples": "-",
        "self-BLEU": "-",
    }
    assert after == health | {
        "checkpoint": "after reinforcement learning (final)",
        "pass@1, on": "45.0% [35.0%, 55.0%]",
        "items x samples": "16 x 4, T 0.6, top-p 0.95",
        "self-BLEU": "0.312",
    }


def test_robustness_table_holds_every_system_prompt_of_every_checkpoint_that_was_asked():
    rows = (
        PromptRobustness(
            variant="missing",
            wanted="either",
            thinks=estimate(0.15, half_width=0.1, num_samples=20),
            answers_at_once=estimate(0.8, half_width=0.05, num_samples=20),
        ),
        PromptRobustness(
            variant="upper case",
            wanted="on",
            thinks=estimate(0.9, half_width=0.05, num_samples=18),
            answers_at_once=estimate(0.05, half_width=0.05, num_samples=18),
        ),
    )
    found = _evaluations()
    asked = {"rl": found["rl"].model_copy(update={"robustness": rows})}
    table = robustness_table({**asked, "sft": found["sft"].model_copy(update={"robustness": ()})})
    assert _cells(table) == [
        {
            "checkpoint": "after reinforcement learning (final)",
            "system prompt": "missing",
            "wanted": "either",
            "thinks": "15.0% [5.0%, 25.0%]",
            "answers at once": "80.0% [75.0%, 85.0%]",
            "n (answers)": 20,
        },
        {
            "checkpoint": "after reinforcement learning (final)",
            "system prompt": "upper case",
            "wanted": "on",
            "thinks": "90.0% [85.0%, 95.0%]",
            "answers at once": "5.0% [0.0%, 10.0%]",
            "n (answers)": 18,
        },
    ]
