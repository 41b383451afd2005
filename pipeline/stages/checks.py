"""What an artifact must pass: one comparison of a metric with a number or with a threshold of the recipe. No torch.

A blocking check stops whatever reads the artifact, in this run and in every later one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.recipe import Recipe, Thresholds


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of a metric with a threshold; evaluated from the artifact, so a new threshold re-runs nothing.

    `unless` is a metric that some artifacts have in place of `metric`: to these the check does not apply.
    """

    name: str
    metric: str
    comparison: Literal["<=", ">=", "=="]
    bound: float | Callable[[Thresholds], float]
    blocking: bool
    description: str
    unless: str | None = None

    def applies_to(self, metrics: Mapping[str, float]) -> bool:
        """Return whether an artifact with these metrics is to be judged; one that lacks both metrics is."""
        return self.unless not in metrics

    def bound_for(self, recipe: Recipe) -> float:
        """Return the number this recipe asks for."""
        return self.bound(recipe.thresholds) if callable(self.bound) else self.bound

    def passes(self, value: float, *, recipe: Recipe) -> bool:
        """Return whether the metric's value meets the bound; NaN never does."""
        bound = self.bound_for(recipe)
        if self.comparison == "<=":
            return value <= bound
        if self.comparison == ">=":
            return value >= bound
        return value == bound


CHECKS: dict[str, tuple[Check, ...]] = {
    "parent_checkpoint": (
        Check(
            name="weights_are_finite",
            metric="num_non_finite_weights",
            comparison="==",
            bound=0,
            blocking=True,
            description="No weight is NaN or infinite.",
        ),
    ),
    "corpora": (
        Check(
            name="every_source_has_documents",
            metric="min_documents_per_source",
            comparison=">=",
            bound=1,
            blocking=True,
            description="No source is empty.",
        ),
    ),
    "distillation_mix": (
        Check(
            name="decontaminated",
            metric="num_contaminated_documents_left",
            comparison="==",
            bound=0,
            blocking=True,
            description="No training document shares an n-gram with an evaluation set.",
        ),
    ),
    "pretraining_mix": (
        Check(
            name="decontaminated",
            metric="num_contaminated_documents_left",
            comparison="==",
            bound=0,
            blocking=True,
            description="No training document shares an n-gram with an evaluation set.",
        ),
    ),
    "channel_importance": (
        Check(
            name="importance_is_finite",
            metric="num_non_finite_values",
            comparison="==",
            bound=0,
            blocking=True,
            description="Every channel and head has a finite statistic.",
        ),
    ),
    "block_library": (
        Check(
            name="no_block_failed",
            metric="num_failed_blocks",
            comparison="==",
            bound=0,
            blocking=True,
            description="Every variant trained to a finite loss.",
        ),
        Check(
            name="distillation_helps",
            metric="share_of_blocks_improved",
            comparison=">=",
            bound=lambda thresholds: thresholds.min_share_of_blocks_improved,
            blocking=False,
            description="Share of trained blocks whose loss fell below that of their initialisation.",
        ),
    ),
    "block_scores": (
        Check(
            name="scores_are_finite",
            metric="num_non_finite_scores",
            comparison="==",
            bound=0,
            blocking=True,
            description="Every candidate has a finite score.",
        ),
    ),
    "block_profile": (
        Check(
            name="blocks_add_up",
            metric="max_relative_residual",
            comparison="<=",
            bound=lambda thresholds: thresholds.max_profile_residual,
            blocking=False,
            description="The sum of block times against the measured parent, before calibration.",
        ),
    ),
    "reasoning_traces": (
        Check(
            name="there_are_rows",
            metric="num_rows",
            comparison=">=",
            bound=1,
            blocking=True,
            description="At least one source gave a row.",
        ),
    ),
    "reasoning_toggle_dataset": (
        Check(
            name="decontaminated",
            metric="num_contaminated_kept",
            comparison="==",
            bound=0,
            blocking=True,
            description="No kept row asks an evaluation question or shares an n-gram with an evaluation set.",
        ),
        Check(
            name="every_trace_verifies",
            metric="num_unverified_traces_kept",
            comparison="==",
            bound=0,
            blocking=True,
            description="Every kept trace ends in an answer its verifier accepts.",
        ),
        Check(
            name="modes_are_paired",
            metric="num_unpaired_prompts",
            comparison="==",
            bound=0,
            blocking=True,
            description="Every reasoning prompt is there in both modes, where the recipe asks for pairs.",
        ),
    ),
    "rl_prompts": (
        Check(
            name="known_right_answers_score_one",
            metric="num_rejected_reference_answers",
            comparison="==",
            bound=0,
            blocking=True,
            description="The verifier gives every reference answer full reward.",
        ),
        Check(
            name="no_answer_dominates",
            metric="max_answer_share",
            comparison="<=",
            bound=0.7,
            blocking=False,
            description="No task's prompts have one answer so often that a policy is best paid for always saying it.",
        ),
    ),
    "mip_solution": (
        Check(
            name="solution_verified",
            metric="num_violated_limits",
            comparison="==",
            bound=0,
            blocking=True,
            description="The chosen blocks, added up from the tables, meet every limit.",
        ),
    ),
    "refined_solution": (
        Check(
            name="solution_verified",
            metric="num_violated_limits",
            comparison="==",
            bound=0,
            blocking=True,
            description="The chosen blocks, added up from the tables, meet every limit.",
        ),
        Check(
            name="chosen_is_no_worse_than_the_first_answer",
            metric="chosen_over_first",
            comparison="<=",
            bound=1,
            blocking=True,
            description="The chosen child, as a whole model, is no farther from the parent than the first answer.",
        ),
    ),
    "baselines": (
        Check(
            name="search_beats_the_baselines",
            metric="kl_over_best_baseline",
            comparison="<=",
            bound=1,
            blocking=False,
            description="As whole models, before any distillation, on text by which nothing was chosen, no simpler "
            "method's child is closer to the parent.",
        ),
    ),
    "pareto": (
        Check(
            name="every_target_is_there",
            metric="num_incomplete_targets",
            comparison="==",
            bound=0,
            blocking=False,
            description="Every target of the recipe has been compared with its baselines, evaluated and measured.",
        ),
        Check(
            name="no_baseline_is_closer_and_as_fast",
            metric="num_dominated_targets",
            comparison="==",
            bound=0,
            blocking=False,
            description="In no target is a simpler method's child closer to the parent and measured as fast or faster.",
        ),
    ),
    "child_checkpoint": (
        Check(
            name="target_is_met_when_measured",
            metric="num_missed_limits",
            comparison="==",
            bound=0,
            blocking=False,
            description="Measured speed of the assembled child against the target, within the recipe's tolerance.",
        ),
    ),
    "kd_checkpoint": (
        Check(
            name="distillation_lowers_kl",
            metric="validation_kl_ratio",
            comparison="<=",
            bound=lambda thresholds: thresholds.max_kd_kl_ratio,
            blocking=True,
            description="KL to the parent on validation tokens, after over before.",
        ),
    ),
    "cpt_checkpoint": (
        Check(
            name="pretraining_does_no_harm",
            metric="validation_perplexity_ratio",
            comparison="<=",
            bound=lambda thresholds: thresholds.max_cpt_perplexity_ratio,
            blocking=True,
            description="Perplexity on the mixture's validation tokens, after over before.",
        ),
    ),
    "sft_checkpoint": (
        Check(
            name="fine_tuning_lowers_loss",
            metric="validation_loss_ratio",
            comparison="<=",
            bound=lambda thresholds: thresholds.max_sft_loss_ratio,
            blocking=True,
            description="Assistant-token loss on held-out samples, after over before.",
        ),
    ),
    "rl_checkpoint": (
        Check(
            name="policy_did_not_collapse",
            metric="num_stops",
            comparison="==",
            bound=0,
            blocking=True,
            description="No stop rule ended the training: no collapse, and no reward that held-out prompts deny.",
        ),
        Check(
            name="policy_stays_near_its_start",
            metric="final_kl",
            comparison="<=",
            bound=lambda thresholds: thresholds.max_rl_kl,
            blocking=True,
            description="KL of the policy to the supervised checkpoint at the last step, nats per token; of the "
            "checkpoint to the policy for offline RPO. Not for on-policy distillation, whose KL is to the parent.",
            unless="kl_to_teacher",
        ),
    ),
    "evaluation": (
        Check(
            name="toggle_on_is_obeyed",
            metric="rl_toggle_compliance_on",
            comparison=">=",
            bound=lambda thresholds: thresholds.min_toggle_compliance,
            blocking=True,
            description="Share of answers with exactly one well-formed think block when thinking is on.",
        ),
        Check(
            name="toggle_off_is_obeyed",
            metric="rl_toggle_compliance_off",
            comparison=">=",
            bound=lambda thresholds: thresholds.min_toggle_compliance,
            blocking=True,
            description="Share of replies with an answer and without any think tag when thinking is off.",
        ),
    ),
    "speed_report": (
        Check(
            name="target_is_met_by_the_final_checkpoint",
            metric="num_missed_limits",
            comparison="==",
            bound=0,
            blocking=False,
            description="The final checkpoint, fused and trained, against the target's limits; times within the "
            "recipe's tolerance.",
        ),
    ),
    "exported_model": (
        Check(
            name="chat_renders_the_same",
            metric="num_token_id_differences",
            comparison="==",
            bound=0,
            blocking=True,
            description="The exported tokenizer renders chats of both modes to the token ids that were trained.",
        ),
        Check(
            name="export_computes_the_same",
            metric="max_abs_logit_difference",
            comparison="<=",
            bound=lambda thresholds: thresholds.max_export_logit_difference,
            blocking=True,
            description="Logits of the exported directory, loaded by transformers, against the checkpoint, fp32.",
        ),
        Check(
            name="portable_to_every_runtime",
            metric="num_runtimes_that_cannot",
            comparison="==",
            bound=0,
            blocking=False,
            description="transformers, vLLM, llama.cpp and mlx-lm all run the export, by rules that "
            "`make test-serving` holds against them; the table says which not, and why.",
        ),
    ),
    "evaluation_sets": (
        Check(
            name="text_is_held_out",
            metric="num_held_out_documents",
            comparison=">=",
            bound=1,
            blocking=True,
            description="There is text that nothing trains on.",
        ),
    ),
    "parent_evaluation": (
        Check(
            name="parent_is_a_language_model",
            metric="parent_perplexity",
            comparison="<=",
            bound=1e6,
            blocking=True,
            description="The parent's perplexity is a number, and not that of noise over a large vocabulary.",
        ),
    ),
    "report": (
        Check(
            name="page_loads_nothing_remote",
            metric="num_remote_loads",
            comparison="==",
            bound=0,
            blocking=True,
            description="The page is self-contained: no script, style or picture comes from elsewhere.",
        ),
    ),
    "model_card": (
        Check(
            name="front_matter_is_complete",
            metric="num_missing_front_matter_keys",
            comparison="==",
            bound=0,
            blocking=True,
            description="A model hub finds licence, base model, library and task in the card.",
        ),
    ),
    "dependency_matrix": (
        Check(
            name="dependencies_are_distances",
            metric="num_invalid_pairs",
            comparison="==",
            bound=0,
            blocking=True,
            description="Every entry is a cosine distance, between 0 and 2.",
        ),
    ),
    "fused_checkpoint": (
        Check(
            name="fusion_stays_close",
            metric="kl_to_unfused_nats",
            comparison="<=",
            bound=lambda thresholds: thresholds.max_fusion_kl,
            blocking=True,
            description="KL of the fused child to the unfused one before any training, nats per token.",
        ),
    ),
    "fusion_report": (
        Check(
            name="wide_ffn_is_exact",
            metric="max_identity_error",
            comparison="<=",
            bound=1e-5,
            blocking=True,
            description="A fused FFN against the sum of the FFNs it joins at one input, relative, fp32 (theorem 3.1).",
        ),
    ),
}
