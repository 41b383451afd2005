"""What the stages of the search compute, read, hold and write, as estimates does for the other stages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.costs import BYTES_PER_PARAMETER, block_parameters, kv_bytes_per_token
from pipeline.planning import devices
from pipeline.planning.case import (
    CANDIDATE_TOKENS,
    DISK,
    KEPT_PARENT_BYTES,
    PARENT_BYTES_PER_WORD,
    START_S,
    Case,
    Estimate,
)
from pipeline.planning.memory import activation_bytes
from pipeline.planning.ranges import ZERO, Range
from pipeline.puzzle.bld_cost import (
    HeldBytes,
    bounded_rounds,
    layer_costs,
    split_layers,
    training_flops_per_token,
)
from pipeline.puzzle.block_keys import library_keys
from pipeline.puzzle.half_scores import measured_around
from pipeline.puzzle.search_space import SearchSpace, dropped
from pipeline.recipe import Backend, Scenario

NUM_METHODS = 7  # of pipeline.stages.baselines, besides the random draws: six, and the search without distillation
MAX_DECODE_STEPS = 8  # of one timing; pipeline.puzzle.timing
# Of one model in one round: llama-bench repeats five times after a warm-up and a filling; vLLM reads the prompt again
# before it decodes.
OUTSIDE_TIMINGS: dict[Backend, float] = {"llama_cpp": 7.0, "vllm": 2.0}


def channel_importance(case: Case) -> Estimate:
    """Return what passing the calibration tokens through the parent costs, once per round."""
    config = case.recipe.channel_importance
    length = case.recipe.distillation_mix.sequence_length
    weights = case.model_bytes(config.precision)
    batch_bytes = 4.0 * config.batch_size * length * (case.sizes.parent.blocks[0].ffn.intermediate_size or 0)
    parent = case.sizes.parent
    per_token = case.sizes.parent_flops(context_tokens=length, with_head=False)
    heads = case.sizes.space.parent.attention.num_key_value_heads or 0
    num_statistics = parent.num_hidden_layers * (3 * (case.sizes.space.parent.ffn.intermediate_size or 0) + heads)
    return Estimate(
        tokens=Range.of(config.tokens),
        work=((Range.of(config.channel_rounds * config.tokens * per_token), devices.FORWARD),),
        memory=Range(low=weights, expected=weights + 2 * batch_bytes, high=1.2 * weights + 6 * batch_bytes),
        memory_parts={"parent": weights, "activations": 2 * batch_bytes},
        disk=Range.of(4.0 * num_statistics),
        extra_s=START_S,
    )


def block_library(case: Case) -> Estimate:
    """Return what training every block costs, the passes of the parent that feed them included."""
    recipe, parent, space = case.recipe, case.sizes.parent, case.sizes.space
    config = recipe.block_library
    length = recipe.distillation_mix.sequence_length
    keys = library_keys(space, config)
    trained = float(sum(block_parameters(parent, key.block) for key in keys))
    flops_per_token = case.sizes.parent_flops(context_tokens=length, with_head=False)
    flops_per_token += training_flops_per_token(parent, keys, context_tokens=length)
    stretches = split_layers(layer_costs(parent, keys, context_tokens=length), case.execution.num_ranks)
    max_gib = case.execution.block_memory_gib
    rounds = [
        bounded_rounds(
            parent,
            [key for key in keys if key.layer in stretch],
            max_bytes=None if max_gib is None else max_gib * 2**30,
            has_closed_form=config.closed_form_tokens > 0,
        )
        for stretch in stretches
    ]
    # In every round the parent runs anew.
    num_rounds = max(len(one) for one in rounds)
    flops_per_token += (num_rounds - 1) * case.sizes.parent_flops(context_tokens=length, with_head=False)
    longest = max(len(stretch) for stretch in stretches)
    layer = block_parameters(parent, space.parent)
    outside = parent.vocab_size * parent.hidden_size  # the embedding, on the first rank
    weights = BYTES_PER_PARAMETER[config.precision] * (longest * layer + outside)
    states = BYTES_PER_PARAMETER[config.precision] * config.closed_form_tokens * parent.hidden_size
    kept = min(states, case.execution.max_activation_bytes)
    held = max(
        (
            parts
            for one in rounds
            for keys_of_round in one or ((),)
            for parts in _block_training_parts(
                HeldBytes.of(parent, keys_of_round), kept_states=kept if config.closed_form_tokens else None
            )
        ),
        key=lambda parts: sum(parts.values()),
    )
    state = sum(held.values())
    num_tokens = config.batch_size * length
    one_layer = parent.with_blocks([space.parent])
    batch = activation_bytes(one_layer, num_tokens=num_tokens, precision=config.precision)
    # The parent's three hidden states, two of them over their root mean square, a block's output and its gradient; fp32
    # target, error and gradient, and for the loss "kl" a slope for each value.
    exact = 16.0 if config.loss == "kl" else 12.0
    batch += num_tokens * parent.hidden_size * (7 * BYTES_PER_PARAMETER[config.precision] + exact)
    # States of the closed-form start in files, gone before progress is saved: of the rank that sends and its next.
    spilled = (states - kept) * min(2, len(stretches))
    return Estimate(
        tokens=Range.of(config.tokens),
        work=((Range.of(config.tokens * flops_per_token), devices.BLOCK_TRAINING),),
        memory=Range(low=weights + state, expected=weights + state + batch, high=1.2 * (weights + state) + 3 * batch),
        memory_parts={"parent": weights, **held, "activations": batch},
        disk=Range.of(4.0 * trained),
        working_disk=Range(
            low=0,
            expected=max(2 * 12.0 * trained / num_rounds, spilled),
            high=max(2 * 12.0 * trained, spilled),
        ),
        extra_s=START_S + Range.of(8 * trained).over(DISK),
        on_all_ranks=True,
    )


def _block_training_parts(held: HeldBytes, *, kept_states: float | None) -> list[dict[str, float]]:
    """Return what blocks hold in training and, where hidden states are kept for one, in their closed-form start."""
    parts = [{"blocks and their AdamW": held.training}]
    if kept_states is not None:
        parts.append(
            {
                "blocks": held.weights,
                "sums and solution of the closed-form start": held.closed_form,
                "hidden states of the closed-form start": kept_states,
            }
        )
    return parts


def block_scores(case: Case) -> Estimate:
    """Return what scoring every block around the parent costs."""
    config, num_layers = case.recipe.block_scores, len(case.sizes.space.layers)
    num_steps = min(config.depth_steps, num_layers)
    scored = _scoring(
        case, tokens=config.tokens, rounds=Range.of(1), num_models=Range.of(0), is_around_a_child=num_steps > 1
    )
    # The first step's are candidates, except of layers that the space does not let go.
    kept = [
        layer
        for layer, options in enumerate(case.sizes.space.layers)
        if dropped(layer).key not in {block.key for block in options.blocks}
    ]
    behind = [[num_layers - 1 - layer for layer in kept]]
    # Whichever go, behind the first of those that are left are all the others, and behind the last none.
    behind += [list(range(num_layers - num_gone)) for num_gone in range(1, num_steps)]
    flops = sum(_without_layers(case, num_gone=num_gone, behind=one) for num_gone, one in enumerate(behind) if one)
    return replace(
        scored,
        tokens=scored.tokens + config.tokens * sum(len(one) for one in behind),
        work=(*scored.work, (Range.of(config.tokens * flops), devices.FORWARD)),
    )


def _without_layers(case: Case, *, num_gone: int, behind: Sequence[int]) -> float:
    """Return the FLOPs a token of leaving out one layer at a time, that many others behind each, and of those around.

    Around them: the parent, and the model without those that are gone, for its end and for what reaches each layer.
    """
    length, num_layers = case.recipe.distillation_mix.sequence_length, len(case.sizes.space.layers)
    layer = case.sizes.parent_flops(context_tokens=length, with_head=False) / num_layers
    parent_bytes = PARENT_BYTES_PER_WORD * case.recipe.block_scores.tokens * case.sizes.parent.vocab_size
    share_kept = min(1.0, KEPT_PARENT_BYTES / parent_bytes)
    num_heads = 2 + len(behind) * (2 - share_kept)
    num_left = num_layers - num_gone
    passes = num_layers + num_left + (num_left if num_gone else 0)  # around the parent its end is the parent's own
    return (sum(behind) + passes) * layer + num_heads * case.sizes.head_flops


def refined_solution(case: Case) -> Estimate:
    """Return what scoring whole models, and blocks again in each round, costs."""
    search, space = case.recipe.search, case.sizes.space
    # A round proposes children for max_changed_layers, its half, ... and 1.
    proposals = search.refinement.max_changed_layers.bit_length() * search.refinement.answers_per_step
    num_rounds = search.most_rounds(num_layers=len(space.layers))
    # They end early only where all tokens for rounds were read around one child.
    rounds = Range(low=min(1, num_rounds), expected=num_rounds, high=num_rounds)
    tokens, of_round = search.refinement.tokens, search.refinement.tokens_per_round
    # Besides the pool what other methods choose; layers are ordered for them in a pass of the parent up to its logits.
    steps = search.refinement.path_steps - 1 if num_rounds else 0
    num_starts = search.pool.num_solutions + NUM_METHODS - 1 + (steps > 0)
    # Where layers are gone whole more is measured, up to all of the space.
    has_pairs = case.recipe.block_library.mode != "decoupled"
    measured = space if has_pairs else measured_around(space, [space.parent] * len(space.layers))
    around = _scoring(
        case,
        tokens=of_round,
        rounds=rounds + steps,
        num_models=Range.of(0),
        measured=measured,
        is_around_a_child=True,
    )
    whole = _scoring(case, tokens=tokens, rounds=Range.of(0), num_models=rounds.times(proposals) + num_starts)
    influence = tokens * case.sizes.parent_flops(
        context_tokens=case.recipe.distillation_mix.sequence_length, with_head=False
    )
    return replace(
        max(around, whole, key=lambda one: one.memory.expected),
        tokens=around.tokens + whole.tokens + tokens,
        work=(*around.work, *whole.work, (Range.of(influence), devices.FORWARD)),
    )


def baselines(case: Case) -> Estimate:
    """Return what scoring and timing the children of simpler methods costs."""
    config = case.recipe.baselines
    num_children = NUM_METHODS + config.num_random
    scored = _scoring(
        case, tokens=case.recipe.search.refinement.tokens, rounds=Range.of(0), num_models=Range.of(num_children)
    )
    timings = OUTSIDE_TIMINGS.get(case.recipe.block_profile.measured_in, 1.0)
    times = num_children * (config.rounds + config.warmups) * timings
    tokens, flops, read = _timings(case, num_parent=times, num_children=times, scenarios=_served(case))
    return replace(
        scored,
        tokens=scored.tokens + tokens,
        work=(*scored.work, (flops, devices.FORWARD)),
        read_bytes=read,
    )


def _scoring(
    case: Case,
    *,
    tokens: int,
    rounds: Range,
    num_models: Range,
    measured: SearchSpace | None = None,
    is_around_a_child: bool = False,
) -> Estimate:
    """Return that many rounds of every block's score on these tokens, and that many whole children scored.

    `measured` are the blocks of a round; all of the space, unless told otherwise. Around a child its own end is held
    beside the parent's and what reaches a layer.
    """
    precision, space = case.recipe.block_scores.precision, measured or case.sizes.space
    length = case.recipe.distillation_mix.sequence_length
    head, num_layers = case.sizes.head_flops, len(space.layers)
    layer = case.sizes.parent_flops(context_tokens=length, with_head=False) / num_layers
    windows = max(1, CANDIDATE_TOKENS // length)  # of one pass
    at_once = max(1, CANDIDATE_TOKENS // (min(windows, max(1, tokens // length)) * length))
    flops = 2 * num_layers * layer + head
    for index, options in enumerate(space.layers):
        num_candidates = len(options.blocks) - 1
        # A candidate is no larger than the layer it stands for; the parent's logits serve all of a pass.
        flops += num_candidates * ((num_layers - index) * layer + head) + math.ceil(num_candidates / at_once) * head
    weights = case.model_bytes(precision)
    hidden = (2 + is_around_a_child) * BYTES_PER_PARAMETER[precision] * tokens * case.sizes.parent.hidden_size
    logits = 8.0 * min(tokens, 8192) * case.sizes.parent.vocab_size
    whole = num_layers * layer + head
    return Estimate(
        tokens=(rounds.times(space.num_candidates) + num_models).times(tokens),
        work=((rounds.times(tokens * flops) + num_models.times(tokens * whole), devices.FORWARD),),
        memory=Range(
            low=weights + hidden, expected=weights + hidden + logits, high=1.5 * weights + hidden + 3 * logits
        ),
        memory_parts={"parent": weights, "hidden states": hidden, "logits": logits},
        extra_s=START_S,
    )


def _timings(
    case: Case, *, num_parent: float, num_children: float, scenarios: Sequence[Scenario]
) -> tuple[Range, Range, Range]:
    """Return tokens, FLOPs and bytes read of timing these scenarios that often on each model."""
    size = BYTES_PER_PARAMETER[case.recipe.block_profile.precision]
    tokens, flops, read = ZERO, ZERO, ZERO
    for scenario in scenarios:
        steps = min(scenario.generation_tokens, MAX_DECODE_STEPS)
        passed = scenario.batch_size * (scenario.prompt_tokens + (scenario.generation_tokens - steps) / 2)
        context = scenario.prompt_tokens
        cached = scenario.batch_size * context * kv_bytes_per_token(case.sizes.parent, bytes_per_value=size)
        # Logits of a prompt's last token alone.
        per_pass = case.sizes.child_flops(context_tokens=context, with_head=False).times(num_children)
        per_pass = per_pass + num_parent * case.sizes.parent_flops(context_tokens=context, with_head=False)
        tokens = tokens + (num_parent + num_children) * (passed + scenario.batch_size * steps)
        flops = flops + per_pass.times(passed)
        weights = case.sizes.child_parameters.times(size * num_children) + num_parent * case.model_bytes(
            case.recipe.block_profile.precision
        )
        read = read + weights.times(steps) + (num_parent + num_children) * steps * cached
    return tokens, flops, read


def _served(case: Case) -> list[Scenario]:
    """Return the scenarios that children are timed in: of a sweep, the largest batch, since the choice is not known."""
    profile = case.recipe.block_profile
    largest = [max(batches, key=lambda one: one.batch_size) for batches in profile.sweeps.values()]
    return [one for one in profile.scenarios if one.sweep is None or one in largest]


def _cache_bytes(case: Case, *, scenarios: Sequence[Scenario]) -> float:
    size = BYTES_PER_PARAMETER[case.recipe.block_profile.precision]
    return max(
        scenario.batch_size
        * (scenario.prompt_tokens + scenario.generation_tokens)
        * kv_bytes_per_token(case.sizes.parent, bytes_per_value=size)
        for scenario in scenarios
    )


def block_profile(case: Case) -> Estimate:
    """Return what timing every variant costs."""
    profile = case.recipe.block_profile
    if profile.backend == "roofline":
        return Estimate(extra_s=START_S)
    # Each round runs the parent twice and a model of all variants, no shallower than the parent, once.
    num_files, timings = 0, 3.0
    if profile.backend in OUTSIDE_TIMINGS:
        # A whole model per variant and three more.
        num_models = len(case.recipe.search_space.attention) + len(case.recipe.search_space.ffn) + 1
        num_files = num_models if profile.backend == "llama_cpp" else 0
        timings = OUTSIDE_TIMINGS[profile.backend] * num_models
    num_parent = timings * (profile.repeats + profile.warmups)
    tokens, flops, read = _timings(case, num_parent=num_parent, num_children=0.0, scenarios=profile.scenarios)
    weights, cache = 2 * case.model_bytes(profile.precision), _cache_bytes(case, scenarios=profile.scenarios)
    disk = Range.of(num_files * case.model_bytes(profile.precision))
    return Estimate(
        tokens=tokens,
        work=((flops, devices.FORWARD),),
        read_bytes=read,
        memory=Range(low=weights, expected=weights + cache, high=1.3 * weights + 2 * cache),
        memory_parts={"two models, or one and another's file": weights, "cache": cache},
        disk=disk,
        extra_s=START_S + disk.over(DISK),
    )


def measured(
    num_parent: float, num_children: float, *, stored_children: int, in_every_backend: bool = False
) -> Callable[[Case], Estimate]:
    """Return the estimate of timing the parent and children beside it, that many of each."""

    def timed(case: Case) -> Estimate:
        recipe = case.recipe
        rounds = recipe.speed_report.rounds + recipe.speed_report.warmups
        # A child is timed in the profile's runtime; the report adds its depths, and does all in each of its backends.
        backends = recipe.speed_report.backends if in_every_backend else (recipe.block_profile.measured_in,)
        depths = recipe.speed_report.depth_scenarios if in_every_backend else ()
        scenarios = (*_served(case), *depths)
        times = rounds * sum(OUTSIDE_TIMINGS.get(backend, 1.0) for backend in backends)
        tokens, flops, read = _timings(
            case, num_parent=num_parent * times, num_children=num_children * times, scenarios=scenarios
        )
        cache = _cache_bytes(case, scenarios=scenarios)
        size = BYTES_PER_PARAMETER[recipe.block_profile.precision]
        parent, child = case.model_bytes(recipe.block_profile.precision), case.sizes.child_parameters.times(size)
        memory = child.times(num_children) + parent + cache
        disk = case.sizes.child_parameters.times(case.stored_bytes * stored_children)
        again = 1 + (recipe.search.max_recalibrations if stored_children else 0)
        return Estimate(
            tokens=tokens,
            work=((Range(low=flops.low, expected=flops.expected, high=again * flops.high), devices.FORWARD),),
            read_bytes=Range(low=read.low, expected=read.expected, high=again * read.high),
            memory=memory,
            memory_parts={
                "parent": parent,
                "children": child.expected * num_children,
                "cache": cache,
            },
            disk=disk,
            extra_s=START_S + disk.times(4).over(DISK),
        )

    return timed


def mip_solution(case: Case) -> Estimate:
    """Return what solving the programme takes, which no model sees; one for each batch size of a swept scenario."""
    num_programmes = 1 + max(map(len, case.recipe.block_profile.sweeps.values()), default=0)
    return Estimate(
        disk=Range(low=1e4, expected=1e5, high=1e6),
        extra_s=Range(low=0.1, expected=3.0, high=max(3.0, case.recipe.search.time_limit_s)).times(num_programmes),
    )
