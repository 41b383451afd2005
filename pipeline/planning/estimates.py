"""What each stage computes, reads, holds and writes, in closed form from the recipe; a function per kind of work.

Tokens are those that a stage passes through a model. FLOPs count two per weight and token of every matrix, and
attention over the whole window: a forward pass is one, a training step three (forward, and backward twice that). Each
is given to the rate that decides it: FLOPs to a share of the peak, bytes to a share of the bandwidth.
"""

import math
from collections.abc import Callable

from pipeline.costs import BYTES_PER_PARAMETER, block_parameters, kv_bytes_per_token
from pipeline.planning import devices, fusion_estimates
from pipeline.planning.case import CANDIDATE_TOKENS, DISK, START_S, Case, Estimate
from pipeline.planning.memory import activation_bytes, sampled_logit_bytes, training_peak_bytes
from pipeline.planning.ranges import ZERO, Range
from pipeline.puzzle.bld_cost import (
    bounded_rounds,
    held_bytes,
    layer_costs,
    split_layers,
    training_flops_per_token,
)
from pipeline.puzzle.block_keys import library_keys
from pipeline.recipe import (
    DistillationConfig,
    MixtureConfig,
    Precision,
    PretrainingConfig,
    RandomParent,
)

PACKED_BYTES_PER_TOKEN = 12.0  # token, label and position as int32
DOCUMENT_BYTES = Range(low=300, expected=3000, high=20_000)
BENCHMARK_TOKENS_PER_CHOICE = 64
PROMPT_TOKENS = 128  # of a generated task, template included
TOKENIZING = Range(low=1e5, expected=5e5, high=3e6)  # tokens per second of one process
IN_PROCESS_S = Range(low=0, expected=0.5, high=5)
MAX_DECODE_STEPS = 8  # of one timing; pipeline.puzzle.timing
NUM_RESUME_CHECKPOINTS = 2
SCORED_ROWS = 16  # of one pass over sampled replies; pipeline.reasoning.experience


def has_estimate(stage_name: str) -> bool:
    """Return whether anything is known of what a stage costs."""
    return stage_name in _ESTIMATES


def estimate(stage_name: str, case: Case) -> Estimate:
    """Return the estimate of one stage: nothing at all for one that has none yet."""
    return _ESTIMATES[stage_name](case) if has_estimate(stage_name) else Estimate()


def _parent(case: Case) -> Estimate:
    size = case.stored_bytes * case.sizes.parent_parameters
    source = 0.0 if isinstance(case.recipe.parent, RandomParent) else size
    return Estimate(
        memory=Range(low=0.1 * size, expected=0.3 * size, high=1.5 * size),
        disk=Range(low=size, expected=size, high=size + source),
        extra_s=Range.of(3 * size).over(DISK) + IN_PROCESS_S,
    )


def _corpora(case: Case) -> Estimate:
    num_documents = sum(source.max_documents for source in case.recipe.corpora.sources)
    disk = DOCUMENT_BYTES.times(num_documents)
    return Estimate(memory=disk.times(0.3), disk=disk, extra_s=disk.times(10).over(DISK) + IN_PROCESS_S)


def _evaluation_sets(case: Case) -> Estimate:
    sets = case.recipe.evaluation_sets
    num_items = sum(text.num_documents for text in sets.held_out) + sum(one.num_items for one in sets.multiple_choice)
    num_items += len(case.recipe.reasoning_tasks) * sets.reasoning_items_per_task
    return Estimate(disk=DOCUMENT_BYTES.times(num_items), extra_s=IN_PROCESS_S)


def _mixture(which: str) -> Callable[[Case], Estimate]:
    def mixture(case: Case) -> Estimate:
        config = getattr(case.recipe, which)
        tokens = config.tokens + config.validation_tokens + sum(more.tokens for more in config.long_context)
        return Estimate(
            tokens=Range.of(tokens),
            memory=Range(low=12.0 * tokens, expected=24.0 * tokens, high=60.0 * tokens),
            disk=Range.of(PACKED_BYTES_PER_TOKEN * tokens),
            extra_s=Range.of(tokens).over(TOKENIZING) + IN_PROCESS_S,
        )

    return mixture


def _importance(case: Case) -> Estimate:
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


def _block_library(case: Case) -> Estimate:
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
    state = max(held_bytes(parent, keys_of_round) for one in rounds for keys_of_round in one or ((),))
    num_tokens = config.batch_size * length
    one_layer = parent.with_blocks([space.parent])
    batch = activation_bytes(one_layer, num_tokens=num_tokens, precision=config.precision)
    # The parent's three hidden states, and fp32 copies of prediction, target, error and its square for the loss.
    batch += num_tokens * parent.hidden_size * (3 * BYTES_PER_PARAMETER[config.precision] + 16.0)
    return Estimate(
        tokens=Range.of(config.tokens),
        work=((Range.of(config.tokens * flops_per_token), devices.BLOCK_TRAINING),),
        memory=Range(low=weights + state, expected=weights + state + batch, high=1.2 * (weights + state) + 3 * batch),
        memory_parts={"parent": weights, "blocks and their AdamW": state, "activations": batch},
        disk=Range.of(4.0 * trained),
        working_disk=Range(low=0, expected=2 * 12.0 * trained / num_rounds, high=2 * 12.0 * trained),
        extra_s=START_S + Range.of(8 * trained).over(DISK),
        on_all_ranks=True,
    )


def _block_scores(case: Case) -> Estimate:
    config, space = case.recipe.block_scores, case.sizes.space
    length = case.recipe.distillation_mix.sequence_length
    head, num_layers = case.sizes.head_flops, len(space.layers)
    layer = case.sizes.parent_flops(context_tokens=length, with_head=False) / num_layers
    windows = max(1, CANDIDATE_TOKENS // length)  # of one pass
    at_once = max(1, CANDIDATE_TOKENS // (min(windows, max(1, config.tokens // length)) * length))
    flops = 2 * num_layers * layer + head
    for index, options in enumerate(space.layers):
        num_candidates = len(options.blocks) - 1
        # A candidate is no larger than the layer it stands for; the parent's logits serve all of a pass.
        flops += num_candidates * ((num_layers - index) * layer + head) + math.ceil(num_candidates / at_once) * head
    weights = case.model_bytes(config.precision)
    hidden = 2 * BYTES_PER_PARAMETER[config.precision] * config.tokens * case.sizes.parent.hidden_size
    logits = 8.0 * min(config.tokens, 8192) * case.sizes.parent.vocab_size
    return Estimate(
        tokens=Range.of(config.tokens * space.num_candidates),
        work=((Range.of(config.tokens * flops), devices.FORWARD),),
        memory=Range(
            low=weights + hidden, expected=weights + hidden + logits, high=1.5 * weights + hidden + 3 * logits
        ),
        memory_parts={"parent": weights, "hidden states": hidden, "logits": logits},
        extra_s=START_S,
    )


def _timings(case: Case, *, num_parent: float, num_children: float) -> tuple[Range, Range, Range]:
    """Return tokens, FLOPs and bytes read of timing every scenario that often on each model."""
    size = BYTES_PER_PARAMETER[case.recipe.block_profile.precision]
    tokens, flops, read = ZERO, ZERO, ZERO
    for scenario in case.recipe.block_profile.scenarios:
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


def _cache_bytes(case: Case) -> float:
    size = BYTES_PER_PARAMETER[case.recipe.block_profile.precision]
    return max(
        scenario.batch_size
        * (scenario.prompt_tokens + scenario.generation_tokens)
        * kv_bytes_per_token(case.sizes.parent, bytes_per_value=size)
        for scenario in case.recipe.block_profile.scenarios
    )


def _block_profile(case: Case) -> Estimate:
    profile = case.recipe.block_profile
    # Each round runs the parent twice and a model of all variants, no shallower than the parent, once.
    num_files, timings = 0, 3
    if profile.backend == "llama_cpp":
        # A whole model per variant and three more; llama-bench repeats five times after a warm-up and a filling.
        num_files = len(case.recipe.search_space.attention) + len(case.recipe.search_space.ffn) + 1
        timings = 7 * num_files
    tokens, flops, read = _timings(case, num_parent=timings * (profile.repeats + profile.warmups), num_children=0.0)
    weights, cache = 2 * case.model_bytes(profile.precision), _cache_bytes(case)
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


def _measured(num_parent: float, num_children: float, *, stored_children: int) -> Callable[[Case], Estimate]:
    def measured(case: Case) -> Estimate:
        recipe = case.recipe
        rounds = recipe.speed_report.rounds + recipe.speed_report.warmups
        tokens, flops, read = _timings(case, num_parent=num_parent * rounds, num_children=num_children * rounds)
        size = BYTES_PER_PARAMETER[recipe.block_profile.precision]
        parent, child = case.model_bytes(recipe.block_profile.precision), case.sizes.child_parameters.times(size)
        memory = child.times(num_children) + parent + _cache_bytes(case)
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
                "cache": _cache_bytes(case),
            },
            disk=disk,
            extra_s=START_S + disk.times(4).over(DISK),
        )

    return measured


def _training(
    case: Case,
    *,
    phases: list[tuple[int, int, int]],
    precision: Precision,
    with_teacher: bool,
) -> Estimate:
    """Return a training over (tokens, sequence_length, global_batch_size) phases."""
    sizes, execution = case.sizes, case.execution
    flops = ZERO
    for tokens, length, _ in phases:
        flops = flops + sizes.child_flops(context_tokens=length).times(3.0 * tokens)
        if with_teacher:
            flops = flops + tokens * sizes.parent_flops(context_tokens=length)
    first = phases[0][1]
    # Longer windows come in smaller micro-batches of no more tokens, one window at least.
    num_tokens = max(
        length
        * micro_batch_rows(
            max(1, execution.micro_batch_size * first // length),
            global_batch_size=batch,
            num_ranks=execution.num_ranks,
        )
        for _, length, batch in phases
    )
    by_size = [
        training_peak_bytes(
            architecture,
            num_parameters=parameters,
            num_tokens=num_tokens,
            precision=precision,
            execution=execution,
            teacher=sizes.parent if with_teacher else None,
            teacher_parameters=sizes.parent_parameters,
        )
        for architecture, parameters in (
            (sizes.smallest, sizes.child_parameters.low),
            (sizes.parent, sizes.child_parameters.high),
        )
    ]
    small, large = by_size
    parts = {name: small[name] + sizes.expected_share * (large[name] - small[name]) for name in large}
    state = (2.0 if precision == "bf16" else 4.0) + 12.0
    disk = sizes.child_parameters.times(case.stored_bytes)
    return Estimate(
        tokens=Range.of(sum(tokens for tokens, _, _ in phases)),
        work=((flops, devices.TRAINING),),
        memory=Range(low=0.9 * sum(small.values()), expected=sum(parts.values()), high=1.3 * sum(large.values())),
        memory_parts=parts,
        disk=disk,
        working_disk=sizes.child_parameters.times(NUM_RESUME_CHECKPOINTS * state),
        extra_s=START_S.times(2) + disk.times(2).over(DISK),
        on_all_ranks=True,
    )


def micro_batch_rows(wanted: int, *, global_batch_size: int, num_ranks: int) -> int:
    """Return the rows that a rank passes through at once: pipeline.training.engine's rule, without its torch."""
    rows_per_rank = max(1, global_batch_size // num_ranks)
    return max(rows for rows in range(1, min(wanted, rows_per_rank) + 1) if rows_per_rank % rows == 0)


def _phases(config: DistillationConfig | PretrainingConfig, mixture: MixtureConfig) -> list[tuple[int, int, int]]:
    later = [(phase.tokens, phase.sequence_length, phase.global_batch_size) for phase in config.long_context]
    return [(config.tokens, mixture.sequence_length, config.global_batch_size), *later]


def _kd(case: Case) -> Estimate:
    config = case.recipe.kd
    phases = _phases(config, case.recipe.distillation_mix)
    return _training(case, phases=phases, precision=config.precision, with_teacher=True)


def _cpt(case: Case) -> Estimate:
    config = case.recipe.cpt
    phases = _phases(config, case.recipe.pretraining_mix)
    return _training(case, phases=phases, precision=config.precision, with_teacher=False)


def _sft(case: Case) -> Estimate:
    config = case.recipe.sft
    window = case.recipe.reasoning_toggle_dataset.sequence_length
    phases = [(part.tokens, window, part.global_batch_size) for part in config.stages]
    return _training(case, phases=phases, precision=config.precision, with_teacher=False)


def _rl(case: Case) -> Estimate:
    config, sizes, ranks = case.recipe.rl, case.sizes, case.execution.num_ranks
    num_samples = config.steps * config.prompts_per_step * config.samples_per_prompt
    longest = config.max_new_tokens
    new = Range(low=0.15 * longest, expected=0.6 * longest, high=longest)  # answers end before the limit, or do not
    sampled = new.times(num_samples)
    length = PROMPT_TOKENS + longest
    child = sizes.child_flops(context_tokens=length)
    rows = sampled + num_samples * PROMPT_TOKENS
    # Sampling, old log-probabilities and the reference's pass forward once; the update passes forward and back.
    forward = Range(
        low=3 * rows.low * child.low, expected=3 * rows.expected * child.expected, high=3 * rows.high * child.high
    )
    size = BYTES_PER_PARAMETER[config.precision]
    steps = new.times(config.steps)
    weights = sizes.child_parameters
    read = Range(
        low=steps.low * weights.low * size,
        expected=steps.expected * weights.expected * size,
        high=steps.high * weights.high * size,
    ).times(ranks)  # every rank reads its own copy
    batch = max(1, config.prompts_per_step * config.samples_per_prompt // config.updates_per_rollout)
    micro_rows = micro_batch_rows(case.execution.micro_batch_size, global_batch_size=batch, num_ranks=ranks)
    trained = _training(case, phases=[(1, length, batch)], precision=config.precision, with_teacher=False)
    samples_at_once = config.prompts_per_step * config.samples_per_prompt / ranks
    cache = samples_at_once * length * kv_bytes_per_token(sizes.parent, bytes_per_value=size)
    reference = weights.times(size)
    parts = {
        **trained.memory_parts,
        "logits": sampled_logit_bytes(
            sizes.parent,
            num_tokens=micro_rows * longest,
            precision=config.precision,
            with_gradient=True,
        ),
        "reference": reference.expected,
        "sampling cache": cache * sizes.expected_share,
    }
    scored_rows = min(SCORED_ROWS, math.ceil(samples_at_once))
    # Between two updates the replies are scored without gradients, and nothing but the models and this is held.
    scoring = sampled_logit_bytes(
        sizes.parent, num_tokens=scored_rows * longest, precision=config.precision, with_gradient=False
    )
    updating = parts["logits"] + parts["activations"]
    if scoring > updating:
        parts = {**parts, "activations": 0.0, "logits": 0.0, "logits of sampled replies": scoring}
    peak = sum(parts.values())
    return Estimate(
        tokens=rows,
        work=((forward, devices.FORWARD), (forward, devices.TRAINING)),
        read_bytes=read,
        memory=Range(
            low=min(peak, trained.memory.low + reference.low),
            expected=peak,
            high=max(peak, trained.memory.high + reference.high + max(scoring, updating)) + cache,
        ),
        memory_parts=parts,
        disk=trained.disk,
        working_disk=trained.working_disk,
        extra_s=trained.extra_s,
        on_all_ranks=True,
    )


def _traces(case: Case) -> Estimate:
    chat = case.recipe.reasoning_traces.chat
    num_items = len(case.recipe.reasoning_tasks) * case.recipe.reasoning_traces.items_per_task
    flops = case.sizes.parent_flops(context_tokens=chat.max_new_tokens)
    # A conversation samples the user's turn and the answer.
    new = Range(low=0.3, expected=1.2, high=2.0).times(chat.num_samples * chat.max_new_tokens)
    num_steps = new.times(1 / max(1, min(chat.batch_size, chat.num_samples)))
    weights = case.model_bytes("bf16")
    return Estimate(
        tokens=new,
        work=((new.times(flops), devices.FORWARD),),
        read_bytes=num_steps.times(weights),
        memory=Range(low=weights, expected=1.2 * weights, high=1.6 * weights),
        memory_parts={"parent": weights},
        disk=Range.of(400.0 * 2 * num_items),
        extra_s=START_S + Range(low=0.0002, expected=0.001, high=0.01).times(num_items),
    )


def _toggle_dataset(case: Case) -> Estimate:
    config, traces = case.recipe.reasoning_toggle_dataset, case.recipe.reasoning_traces
    num_rows = 2 * len(case.recipe.reasoning_tasks) * traces.items_per_task + traces.chat.num_samples
    tokens = Range(low=50, expected=150, high=750).times(num_rows)
    disk = tokens.times(2 * PACKED_BYTES_PER_TOKEN * len(config.blends))
    extra_s = START_S.times(2) + Range(low=0.0005, expected=0.001, high=0.01).times(num_rows)
    return Estimate(tokens=tokens, disk=disk, extra_s=extra_s)


def _rl_prompts(case: Case) -> Estimate:
    num_items = len(case.recipe.reasoning_tasks) * case.recipe.rl_prompts.items_per_task
    return Estimate(
        disk=Range.of(500.0 * num_items),
        extra_s=IN_PROCESS_S + Range(low=0.0002, expected=0.002, high=0.02).times(num_items),
    )


def _evaluations(num_parents: int, num_children: int) -> Callable[[Case], Estimate]:
    def evaluations(case: Case) -> Estimate:
        config, sets = case.recipe.evaluation, case.recipe.evaluation_sets
        text = len(sets.held_out) * config.text_tokens_per_set
        choices = sum(one.num_items for one in sets.multiple_choice) * 2 * BENCHMARK_TOKENS_PER_CHOICE
        num_items = (len(case.recipe.reasoning_tasks) + len(sets.held_out_tasks)) * sets.reasoning_items_per_task
        num_items += (7 * config.robustness_items + config.sampled.num_items * config.sampled.num_samples) // 2
        most_new = config.max_new_tokens_on + config.max_new_tokens_off
        generated = Range(low=0.1, expected=0.7, high=1.0).times(num_items * most_new)
        per_checkpoint = generated + text + choices + 2 * num_items * PROMPT_TOKENS
        length = config.sequence_length
        child, parent = case.sizes.child_flops(context_tokens=length), case.sizes.parent_flops(context_tokens=length)
        size = BYTES_PER_PARAMETER[config.precision]
        per_pass = child.times(num_children) + num_parents * parent
        # The parent's text is passed through once more where children are compared with it.
        flops = Range(
            low=per_checkpoint.low * per_pass.low,
            expected=per_checkpoint.expected * per_pass.expected,
            high=per_checkpoint.high * per_pass.high,
        ) + (text * parent if num_children else 0.0)
        num_steps = generated.times(1 / min(config.batch_size, num_items))
        weights = case.sizes.child_parameters.times(size * num_children) + num_parents * case.model_bytes(
            config.precision
        )
        # The parent alone; or a child, while the parent reads the text that the two are compared on.
        held = Range.of(case.model_bytes(config.precision))
        held = held + (case.sizes.child_parameters.times(size) if num_children else 0.0)
        memory = Range(low=held.low, expected=held.expected, high=1.25 * held.high)
        logits = 8.0 * config.batch_size * length * case.sizes.parent.vocab_size
        return Estimate(
            tokens=per_checkpoint.times(num_parents + num_children),
            work=((flops, devices.FORWARD),),
            read_bytes=Range(
                low=num_steps.low * weights.low,
                expected=num_steps.expected * weights.expected,
                high=num_steps.high * weights.high,
            ),
            memory=memory + Range(low=0, expected=logits, high=2 * logits),
            memory_parts={"models": memory.expected, "logits": logits},
            disk=Range(low=1e4, expected=1e5, high=1e7),
            extra_s=START_S,
        )

    return evaluations


def _mip(case: Case) -> Estimate:
    return Estimate(
        disk=Range(low=1e4, expected=1e5, high=1e6),
        extra_s=Range(low=0.1, expected=3.0, high=max(3.0, case.recipe.search.time_limit_s)),
    )


def _export(case: Case) -> Estimate:
    gguf = case.recipe.exported_model.gguf
    gguf_bytes = 0.0 if gguf is None else BYTES_PER_PARAMETER[gguf]
    disk = case.sizes.child_parameters.times(case.stored_bytes + gguf_bytes)
    memory = case.sizes.child_parameters.times(4.0)
    return Estimate(
        memory=memory.times(2),
        disk=Range(low=disk.low, expected=disk.expected, high=1.1 * disk.high),
        extra_s=START_S + disk.times(6).over(DISK),
    )


def _page(case: Case) -> Estimate:
    return Estimate(disk=Range(low=1e4, expected=1e6, high=2e7), extra_s=Range(low=0, expected=2, high=30))


_ESTIMATES: dict[str, Callable[[Case], Estimate]] = {
    "parent_checkpoint": _parent,
    "corpora": _corpora,
    "evaluation_sets": _evaluation_sets,
    "distillation_mix": _mixture("distillation_mix"),
    "pretraining_mix": _mixture("pretraining_mix"),
    "channel_importance": _importance,
    "block_library": _block_library,
    "block_scores": _block_scores,
    "block_profile": _block_profile,
    "reasoning_traces": _traces,
    "reasoning_toggle_dataset": _toggle_dataset,
    "rl_prompts": _rl_prompts,
    "parent_evaluation": _evaluations(1, 0),
    "mip_solution": _mip,
    "child_checkpoint": _measured(1, 1, stored_children=1),
    "dependency_matrix": fusion_estimates.dependency_matrix,
    "fused_checkpoint": fusion_estimates.fused_checkpoint,
    "fusion_report": fusion_estimates.fusion_report,
    "kd_checkpoint": _kd,
    "cpt_checkpoint": _cpt,
    "sft_checkpoint": _sft,
    "rl_checkpoint": _rl,
    "evaluation": _evaluations(0, 6),
    "speed_report": _measured(1, 2, stored_children=0),
    "exported_model": _export,
    "model_card": _page,
    "report": _page,
    "pareto": _page,
}
