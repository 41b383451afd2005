"""Finished artifacts as a run leaves them, with figures chosen by hand."""

from pathlib import Path

import polars as pl

from pipeline.architecture import NO_ATTENTION, Architecture, BlockSpec, gqa, swiglu
from pipeline.artifacts import ArtifactStore
from pipeline.evaluation.intervals import Estimate, share
from pipeline.evaluation.results import (
    CHECKPOINTS,
    BothModes,
    ChainHealth,
    CheckpointEvaluation,
    InstructionQuality,
    ModeQuality,
    MultipleChoiceQuality,
    PromptRobustness,
    SampleAnswer,
    SampledQuality,
    TextQuality,
    write_evaluations,
)
from pipeline.puzzle.tables import DEPENDENCIES, LOSSES, SCHEMAS, SCORES, write_table
from pipeline.stage import StageResult, Table

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>&lt;b&gt;{{ 7 * 7 }}"
PERPLEXITY = {"parent": 29.0, "child": 61.0, "fused": 61.0, "kd": 36.0, "cpt": 34.0, "sft": 35.0, "rl": 35.5}
CARD_INPUTS = (
    "exported_model",
    "evaluation",
    "speed_report",
    "child_checkpoint",
    "corpora",
    "reasoning_toggle_dataset",
)


def parent_architecture() -> Architecture:
    blocks = [BlockSpec(attention=gqa(2), ffn=swiglu(64), parent_layers=(layer,)) for layer in range(4)]
    return Architecture(
        vocab_size=320,
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
        blocks=tuple(blocks),
    )


def child_architecture() -> Architecture:
    parent = parent_architecture()
    fused = BlockSpec(attention=NO_ATTENTION, ffn=swiglu(96), parent_layers=(2, 3))
    narrow = BlockSpec(attention=gqa(1), ffn=swiglu(32), parent_layers=(1,))
    return parent.with_blocks([parent.blocks[0], narrow, fused])


def estimate(value: float, *, half_width: float, num_samples: int = 12) -> Estimate:
    return Estimate(value=value, low=value - half_width, high=value + half_width, num_samples=num_samples)


def checkpoint_evaluation(name: str) -> CheckpointEvaluation:
    text = TextQuality(
        num_tokens=6144,
        perplexity=estimate(PERPLEXITY[name], half_width=2.0),
        kl_nats_per_token=estimate(0.0, half_width=0.0)
        if name == "parent"
        else estimate(PERPLEXITY[name] / 100, half_width=0.01),
        top1_agreement=estimate(0.7, half_width=0.02),
    )
    is_trained = name in ("sft", "rl")
    on = ModeQuality(
        answer_found=share(8 if is_trained else 2, num_samples=20),
        answer_found_by_task={"chain_sum": share(8 if is_trained else 2, num_samples=20)},
        exact_reply=share(7 if is_trained else 0, num_samples=20),
        toggle_compliance=share(19 if is_trained else 0, num_samples=20),
        mean_tokens=41.5,
        num_truncated=1,
        num_empty=0,
        max_new_tokens=96,
    )
    off = on.model_copy(update={"toggle_compliance": share(20, num_samples=20), "max_new_tokens": 16})
    return CheckpointEvaluation(
        harness_version=1,
        precision="bf16",
        template_sha256="ab" * 32,
        num_parameters=1000 if name == "parent" else 800,
        text_overall=text,
        text={"web": text},
        multiple_choice={
            "piqa": MultipleChoiceQuality(
                accuracy=share(30, num_samples=50),
                accuracy_normalised=share(31 if name == "parent" else 28, num_samples=50),
                chance=0.5,
            )
        },
        thinking_on=on,
        thinking_off=off,
        held_out_tasks={"family not trained on": BothModes(thinking_on=on, thinking_off=off)},
        instructions={
            mode: InstructionQuality(
                prompt_strict=share(9, num_samples=20),
                prompt_loose=share(10, num_samples=20),
                instruction_strict=estimate(0.6, half_width=0.1, num_samples=20),
                instruction_loose=estimate(0.65, half_width=0.1, num_samples=20),
                num_instructions=31,
            )
            for mode in ("on", "off")
        },
        robustness=(
            PromptRobustness(
                variant="missing",
                wanted="either",
                thinks=share(3, num_samples=20),
                answers_at_once=share(17, num_samples=20),
            ),
        ),
        sampled=SampledQuality(
            pass_at_1=estimate(0.4, half_width=0.1, num_samples=16),
            share_compliant=0.9,
            mean_tokens=40.0,
            num_samples=4,
            temperature=0.6,
            top_p=0.95,
        ),
        chains=ChainHealth(
            num_words=estimate(30.0, half_width=2.0),
            repeated_share=estimate(0.1, half_width=0.05),
            looping=share(1, num_samples=20),
            self_bleu=0.5,
        ),
        samples=(
            SampleAnswer(
                task="chain_sum",
                question="What is 1 + 1?",
                reference="2",
                thinking_on=f"<think>\n{HOSTILE}\n</think>\n\n2",
                thinking_off=HOSTILE,
            ),
        ),
    )


def publish_run(root: Path) -> dict[str, Path]:
    """Publish every artifact that a report reads, and return their directories by asset."""
    store = ArtifactStore(root)
    results: dict[str, StageResult] = {
        "corpora": StageResult(
            tables={
                "sources": Table.of(("source", "domain", "licence", "num_documents"), [("web", "web", "CC0-1.0", 9)])
            }
        ),
        "child_checkpoint": StageResult(
            metrics={
                "predicted_decode_speedup": 1.4,
                "predicted_prefill_speedup": 1.2,
                "measured_decode_speedup": 1.31,
                "measured_prefill_speedup": 0.97,
                "num_missed_limits": 0,
            },
            tables={"rounds": Table.of(("round", "objective"), [(0, 0.12), (1, 0.15)])},
        ),
        "fusion_report": StageResult(
            tables={"arrangements": Table.of(("model", "kl_to_child_nats"), [("fused", 0.1)])}
        ),
        "speed_report": StageResult(
            metrics={
                "decode_speedup": 1.3,
                "decode_speedup_low": 1.25,
                "decode_speedup_high": 1.36,
                "prefill_speedup": 0.96,
                "prefill_speedup_low": 0.95,
                "prefill_speedup_high": 0.98,
                "num_rounds": 15,
                "num_limits": 3,
                "num_missed_limits": 1,
                "num_limits_within_tolerance": 1,
                "speed_tolerance": 0.05,
            },
            facts={"hardware": "two cores"},
        ),
    }
    names = (
        "parent_checkpoint",
        "corpora",
        "reasoning_toggle_dataset",
        "block_library",
        "block_scores",
        "mip_solution",
        "refined_solution",
        "baselines",
        "dependency_matrix",
        *(f"{name}_checkpoint" for name in CHECKPOINTS[1:]),
        "fusion_report",
        "evaluation",
        "speed_report",
        "exported_model",
        "report",
    )
    artifacts = {}
    for index, name in enumerate(names):
        with store.locked(name, "f00") as directory:
            _write_files(name, directory)
            store.publish(
                name, "f00", result=results.get(name, StageResult()), wall_s=10.0 + index, provenance={"ranks": 1}
            )
        artifacts[name] = directory
    return artifacts


def _write_files(name: str, directory: Path) -> None:
    if name.endswith("_checkpoint"):
        architecture = parent_architecture() if name == "parent_checkpoint" else child_architecture()
        (directory / "architecture.json").write_text(architecture.model_dump_json())
    if name in ("kd_checkpoint", "cpt_checkpoint", "sft_checkpoint", "rl_checkpoint"):
        curve = {"step": [1, 2, 3], "tokens": [64, 128, 192], "loss": [3.0, 2.5, 2.4], "reward": [0.1, 0.2, 0.4]}
        pl.DataFrame(curve).write_parquet(directory / "curve.parquet")
    if name == "evaluation":
        write_evaluations(directory, checkpoints={key: checkpoint_evaluation(key) for key in CHECKPOINTS})
    if name == "block_scores":
        rows = [
            {
                "layer": layer,
                "attention": attention,
                "ffn": "ffn64",
                "is_base": attention == "kv2",
                "kl": kl * (layer + 1),
                "lm_loss": 3.0,
                "hidden_cosine": 0.1 * kl,
                "top1_error": 0.0,
                "task_error": None,
                "num_tokens": 64,
            }
            for layer in range(4)
            for attention, kl in (("kv2", 0.0), ("kv1", 0.01), ("no_op", 0.2))
        ]
        write_table(directory, SCORES, pl.DataFrame(rows, schema=SCHEMAS[SCORES]))
    if name == "block_library":
        losses = [
            {"layer": layer, "subblock": "attention", "variant": "kv1", "step": step, "loss": 0.5 / step}
            for layer in range(4)
            for step in (1, 2)
        ]
        write_table(directory, LOSSES, pl.DataFrame(losses))
    if name == "dependency_matrix":
        pairs = [
            {"removed_layer": removed, "layer": layer, "cosine_distance": 10.0**-layer}
            for layer in range(3)
            for removed in range(layer)
        ]
        write_table(directory, DEPENDENCIES, pl.DataFrame(pairs))
