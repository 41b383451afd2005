"""What a person looks at first in each stage's artifact: a few numbers with their units, and where to look next."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["", "%", "x", "s", "nats/token", "MiB", "bytes", "bytes/token", "tokens", "tokens/s"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Highlight:
    """The numbers shown above all others, as {metric: (label, unit)}, and one sentence for the asset's description.

    `page` is a file of the artifact that people open; `sparkline` a column of the table `training_curve`.
    """

    look_at: str
    numbers: Mapping[str, tuple[str, Unit]] = field(default_factory=dict)
    page: str | None = None
    sparkline: str | None = None


HIGHLIGHTS: Mapping[str, Highlight] = {
    "parent_checkpoint": Highlight(
        look_at="parameters and licence; every child is compared with these sizes.",
        numbers={
            "num_parameters": ("Parameters", ""),
            "num_hidden_layers": ("Layers", ""),
            "kv_bytes_per_token": ("KV cache", "bytes/token"),
        },
    ),
    "corpora": Highlight(
        look_at="documents and licence of every source.",
        numbers={
            "num_sources": ("Sources", ""),
            "num_documents": ("Documents", ""),
            "num_characters": ("Characters", ""),
        },
    ),
    "evaluation_sets": Highlight(
        look_at="how many items each measurement rests on.",
        numbers={
            "num_held_out_documents": ("Held-out documents", ""),
            "num_multiple_choice_items": ("Multiple-choice items", ""),
            "num_reasoning_items": ("Reasoning items", ""),
        },
    ),
    "distillation_mix": Highlight(
        look_at="the share asked for beside the share got, and how many documents were contaminated.",
        numbers={
            "num_tokens": ("Training", "tokens"),
            "num_validation_tokens": ("Validation", "tokens"),
            "num_contaminated_documents": ("Contaminated documents dropped", ""),
        },
    ),
    "pretraining_mix": Highlight(
        look_at="the share asked for beside the share got, and how many documents were contaminated.",
        numbers={
            "num_tokens": ("Training", "tokens"),
            "num_validation_tokens": ("Validation", "tokens"),
            "num_contaminated_documents": ("Contaminated documents dropped", ""),
        },
    ),
    "channel_importance": Highlight(
        look_at="the share of the stronger half: near 50 %, a layer's channels matter alike and pruning it costs most.",
        numbers={"num_tokens": ("Calibrated on", "tokens")},
    ),
    "block_library": Highlight(
        look_at="the loss of every variant before and after, and any layer that did not improve.",
        numbers={
            "num_trained_blocks": ("Blocks trained", ""),
            "num_failed_blocks": ("Blocks failed", ""),
            "share_of_blocks_improved": ("Blocks improved", "%"),
            "num_tokens": ("Trained on", "tokens"),
        },
    ),
    "block_scores": Highlight(
        look_at="the layers whose replacement costs little: there the search saves. `depth`: their order to go.",
        numbers={
            "num_candidates": ("Blocks scored", ""),
            "parent_lm_loss": ("Parent's loss", "nats/token"),
            "num_tokens": ("Scored on", "tokens"),
        },
    ),
    "block_profile": Highlight(
        look_at="whether the blocks add up to the measured parent; the search trusts these times.",
        numbers={
            "max_relative_residual": ("Sum of blocks off the parent by", "%"),
            "max_drift": ("Drift while measuring", "%"),
            "num_variants": ("Variants measured", ""),
        },
    ),
    "reasoning_traces": Highlight(
        look_at="rows and tokens of every source, before anything is filtered.",
        numbers={
            "num_rows": ("Rows", ""),
            "num_sources": ("Sources", ""),
            "num_prompt_tokens": ("Sent to endpoints", "tokens"),
            "num_completion_tokens": ("Written by endpoints", "tokens"),
        },
    ),
    "reasoning_toggle_dataset": Highlight(
        look_at="rows in and out of every filter, and a few samples of either mode, with the trained tokens in bold.",
        numbers={
            "num_rows": ("Rows before the filters", ""),
            "num_samples": ("Samples kept", ""),
            "num_pairs": ("Pairs, thinking on and off", ""),
            "num_chat": ("Chat samples", ""),
            "num_trained_tokens": ("Trained", "tokens"),
            "trained_token_share": ("Share that is trained", "%"),
        },
    ),
    "rl_prompts": Highlight(
        look_at="the questions and the answers their verifiers accept.",
        numbers={
            "num_prompts": ("Prompts", ""),
            "num_instruction_prompts": ("With instructions", ""),
            "num_excluded_questions": ("Left out as seen elsewhere", ""),
        },
    ),
    "parent_evaluation": Highlight(
        look_at="what the child has to keep: perplexity, and both modes of the switch.",
        numbers={
            "parent_perplexity": ("Perplexity", ""),
            "parent_accuracy_on": ("Right answers, thinking on", "%"),
            "parent_accuracy_off": ("Right answers, thinking off", "%"),
        },
    ),
    "mip_solution": Highlight(
        look_at="the chosen architecture, and each limit with its predicted value.",
        numbers={
            "predicted_decode_speedup": ("Predicted decode speed-up", "x"),
            "predicted_prefill_speedup": ("Predicted prefill speed-up", "x"),
            "predicted_kl": ("Predicted KL to the parent", "nats/token"),
            "num_parameters": ("Parameters", ""),
            "num_attention_free_layers": ("Layers without attention", ""),
            "num_violated_limits": ("Limits violated", ""),
        },
    ),
    "refined_solution": Highlight(
        look_at="what sums of scores predicted beside what whole models measured, and what the rounds gained.",
        numbers={
            "kl_of_the_chosen": ("KL to the parent, whole model", "nats/token"),
            "kl_of_the_first_answer": ("The programme's first answer", "nats/token"),
            "top1_error_of_the_chosen": ("Next token differs", "%"),
            "num_whole_models": ("Whole models scored", ""),
            "num_parameters": ("Parameters", ""),
            "num_violated_limits": ("Limits violated", ""),
        },
    ),
    "baselines": Highlight(
        look_at="the table of children, the closest to the parent first, and where the search does not come first.",
        numbers={
            "puzzle_kl": ("KL of the refined solution", "nats/token"),
            "kl_without_block_distillation": ("Without block distillation", "nats/token"),
            "best_baseline_kl": ("Best baseline", "nats/token"),
            "num_children": ("Children compared", ""),
        },
    ),
    "child_checkpoint": Highlight(
        look_at="predicted beside measured, and how often the search had to be repeated.",
        numbers={
            "measured_decode_speedup": ("Measured decode speed-up", "x"),
            "predicted_decode_speedup": ("Predicted decode speed-up", "x"),
            "num_missed_limits": ("Limits missed", ""),
            "num_recalibrations": ("Searches repeated", ""),
        },
    ),
    "dependency_matrix": Highlight(
        look_at="dark squares on the diagonal: successive blocks that hardly need each other.",
        numbers={
            "min_dependency": ("Smallest dependency", ""),
            "max_dependency": ("Largest dependency", ""),
            "num_tokens": ("Measured on", "tokens"),
        },
    ),
    "fused_checkpoint": Highlight(
        look_at="how many layers were saved, and what that cost before any training.",
        numbers={
            "num_layers_before": ("Layers before", ""),
            "num_layers_after": ("Layers after", ""),
            "kl_to_unfused_nats": ("KL to the unfused child", "nats/token"),
        },
    ),
    "fusion_report": Highlight(
        look_at="fusion beside deletion at equal latency, and both norm rules.",
        numbers={
            "kl_fold_each_nats": ("KL to the unfused child, norms folded", "nats/token"),
            "kl_last_nats": ("KL to the unfused child, last norm", "nats/token"),
            "kl_deleted_nats": ("KL to the unfused child, FFNs deleted instead", "nats/token"),
            "num_deleted_at_equal_latency": ("FFNs deleted for the same latency", ""),
            "decode_speedup": ("Decode speed-up by fusion", "x"),
        },
    ),
    "kd_checkpoint": Highlight(
        look_at="the curve, and how much nearer to the parent it came; while it trains, *Plots*, *Events*, `loss`.",
        numbers={
            "validation_kl_before": ("KL to the parent before", "nats/token"),
            "validation_kl_after": ("KL to the parent after", "nats/token"),
            "num_tokens": ("Trained on", "tokens"),
            "tokens_per_second": ("Speed", "tokens/s"),
        },
        sparkline="loss",
    ),
    "cpt_checkpoint": Highlight(
        look_at="the curve and the held-out perplexity; while it trains, *Plots*, *Events*, `loss`.",
        numbers={
            "validation_perplexity_before": ("Held-out perplexity before", ""),
            "validation_perplexity_after": ("Held-out perplexity after", ""),
            "num_tokens": ("Trained on", "tokens"),
            "tokens_per_second": ("Speed", "tokens/s"),
        },
        sparkline="loss",
    ),
    "sft_checkpoint": Highlight(
        look_at="the curve and the held-out loss; while it trains, *Plots*, *Events*, `loss`.",
        numbers={
            "validation_loss_before": ("Held-out loss before", "nats/token"),
            "validation_loss_after": ("Held-out loss after", "nats/token"),
            "num_tokens": ("Trained on", "tokens"),
            "tokens_per_second": ("Speed", "tokens/s"),
        },
        sparkline="loss",
    ),
    "rl_checkpoint": Highlight(
        look_at="reward and KL together, then the sampled answers; while it trains, *Plots*, *Events*, `reward`.",
        numbers={
            "reward_first": ("Reward at first", ""),
            "reward_last": ("Reward at last", ""),
            "final_kl": ("KL to the supervised checkpoint", "nats/token"),
            "kl_to_teacher": ("KL to the teacher", "nats/token"),
            "accuracy_last": ("Right answers at last", "%"),
        },
        sparkline="reward",
    ),
    "evaluation": Highlight(
        look_at="the last row of each table against the first; brackets are confidence intervals.",
        numbers={
            "parent_perplexity": ("Perplexity, parent", ""),
            "rl_perplexity": ("Perplexity, final", ""),
            "rl_kl": ("KL to the parent, final", "nats/token"),
            "rl_toggle_compliance_on": ("Obeys *thinking on*", "%"),
            "rl_toggle_compliance_off": ("Obeys *thinking off*", "%"),
        },
    ),
    "speed_report": Highlight(
        look_at="measured speed-ups with their intervals, and every limit of the target.",
        numbers={
            "decode_speedup": ("Decode speed-up", "x"),
            "prefill_speedup": ("Prefill speed-up", "x"),
            "final_weights_mib": ("Weights", "MiB"),
            "final_cached_tokens": ("Fits in the cache", "tokens"),
            "num_missed_limits": ("Limits missed", ""),
        },
    ),
    "exported_model": Highlight(
        look_at="which runtimes run the export, and why others cannot.",
        numbers={
            "num_parameters": ("Parameters", ""),
            "size_mib": ("Size", "MiB"),
            "max_abs_logit_difference": ("Largest difference of a logit", ""),
            "num_runtimes_that_cannot": ("Runtimes that cannot run it", ""),
        },
    ),
    "pareto": Highlight(
        look_at="the plot: the line joins the children that none beats; the check says where a baseline wins.",
        numbers={
            "num_children": ("Children drawn", ""),
            "num_targets": ("Targets", ""),
            "num_incomplete_targets": ("Of them incomplete", ""),
            "num_dominated_targets": ("Targets where a baseline wins", ""),
        },
    ),
    "model_card": Highlight(
        look_at="the card itself.", numbers={"size_bytes": ("Size", "bytes")}, page="model_card.md"
    ),
    "report": Highlight(
        look_at="the page, in a browser; its verdict is below.",
        numbers={"num_sections": ("Sections", ""), "size_bytes": ("Size", "bytes")},
        page="report.html",
    ),
}

# Of a stage without an entry everything is shown, nothing first.
NOTHING_FIRST = Highlight(look_at="its numbers and tables.")
