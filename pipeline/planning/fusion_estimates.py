"""What the stages about FFN fusion compute, read, hold and write, as estimates does for the other stages."""

from pipeline.costs import BYTES_PER_PARAMETER
from pipeline.planning import devices
from pipeline.planning.case import CANDIDATE_TOKENS, DISK, START_S, Case, Estimate
from pipeline.planning.ranges import Range


def dependency_matrix(case: Case) -> Estimate:
    """Return what every block with each block before it removed costs."""
    config, num_layers = case.recipe.dependency_matrix, case.sizes.parent.num_hidden_layers
    length = case.recipe.distillation_mix.sequence_length
    # Layer j runs once as it is and once for each of the j removals before it.
    per_pass = case.sizes.child_flops(context_tokens=length, with_head=False).times(config.tokens)
    weights = case.sizes.child_parameters.times(BYTES_PER_PARAMETER[config.precision])
    # Windows come in groups of that many tokens, at least one window.
    states = (
        num_layers * BYTES_PER_PARAMETER[config.precision] * max(CANDIDATE_TOKENS, length)
    ) * case.sizes.parent.hidden_size
    return Estimate(
        tokens=Range.of(config.tokens),
        work=((per_pass.times((num_layers + 1) / 2), devices.FORWARD),),
        memory=Range(low=weights.low, expected=weights.expected + states, high=1.3 * weights.high + 3 * states),
        memory_parts={"child": weights.expected, "states without each block": states},
        extra_s=START_S,
    )


def fused_checkpoint(case: Case) -> Estimate:
    """Return what measuring candidate runs and writing the fused child cost."""
    fusion = case.recipe.fusion
    length = case.recipe.distillation_mix.sequence_length
    per_pass = case.sizes.child_flops(context_tokens=length).times(fusion.calibration_tokens)
    # Before, after, and each candidate run alone.
    most_runs = max(1.0, case.sizes.parent.num_hidden_layers / fusion.min_run_layers)
    # One model at a time, beside the child's final states.
    size = BYTES_PER_PARAMETER[fusion.precision]
    weights = case.sizes.child_parameters.times(size)
    states = size * fusion.calibration_tokens * case.sizes.parent.hidden_size
    disk = case.sizes.child_parameters.times(case.stored_bytes)
    return Estimate(
        tokens=Range(low=0, expected=fusion.calibration_tokens * 3, high=fusion.calibration_tokens * (2 + most_runs)),
        work=((Range(low=0, expected=3 * per_pass.expected, high=(2 + most_runs) * per_pass.high), devices.FORWARD),),
        memory=Range(low=weights.low, expected=weights.expected + states, high=1.3 * weights.high + 3 * states),
        memory_parts={"child": weights.expected, "final states": states},
        disk=disk,
        extra_s=START_S + disk.times(4).over(DISK),
    )


def fusion_report(case: Case) -> Estimate:
    """Return what comparing fusion with deletion and reversal costs."""
    fusion, num_layers = case.recipe.fusion, case.sizes.parent.num_hidden_layers
    per_pass = case.sizes.child_flops(context_tokens=case.recipe.distillation_mix.sequence_length)
    # Ten models, and the child without each FFN that is fused: none where nothing is, all layers at most.
    passes = Range(low=0, expected=10 + num_layers / 8, high=10 + num_layers)
    size = BYTES_PER_PARAMETER[fusion.precision]
    weights = case.sizes.child_parameters.times(size) + case.model_bytes(fusion.precision)
    states = 2 * size * fusion.calibration_tokens * case.sizes.parent.hidden_size
    work = Range(
        low=passes.low * per_pass.low, expected=passes.expected * per_pass.expected, high=passes.high * per_pass.high
    )
    return Estimate(
        tokens=passes.times(fusion.calibration_tokens),
        work=((work.times(fusion.calibration_tokens), devices.FORWARD),),
        memory=Range(low=weights.low, expected=weights.expected + states, high=1.3 * weights.high + 3 * states),
        memory_parts={"parent and child": weights.expected, "final states": states},
        extra_s=START_S,
    )
