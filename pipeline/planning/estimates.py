"""What each stage computes, reads, holds and writes, in closed form from the recipe; a function per kind of work.

Tokens are those that a stage passes through a model. FLOPs count two per weight and token of every matrix, and
attention over the whole window: a forward pass is one, a training step three (forward, and backward twice that). Each
is given to the rate that decides it: FLOPs to a share of the peak, bytes to a share of the bandwidth.
"""

import math
from collections.abc import Callable

from pipeline.costs import BYTES_PER_PARAMETER
from pipeline.planning import devices, fusion_estimates, puzzle_estimates, training_estimates
from pipeline.planning.case import DISK, IN_PROCESS_S, PROMPT_TOKENS, START_S, Case, Estimate
from pipeline.planning.ranges import ZERO, Range
from pipeline.recipe import OWN_REASONING_TASKS, OWN_TASK_PREFIX, RandomParent

PACKED_BYTES_PER_TOKEN = 12.0  # token, label and position as int32
DOCUMENT_BYTES = Range(low=300, expected=3000, high=20_000)
BENCHMARK_TOKENS_PER_CHOICE = 64
TOKENIZING = Range(low=1e5, expected=5e5, high=3e6)  # tokens per second of one process


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
    num_items += len(case.recipe.reasoning_tasks) * sets.reasoning_items_per_task + sets.instructions.num_prompts
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
    num_items = training_estimates.num_rl_prompts(case.recipe)
    return Estimate(
        disk=Range.of(500.0 * num_items),
        extra_s=IN_PROCESS_S + Range(low=0.0002, expected=0.002, high=0.02).times(num_items),
    )


def _lm_eval(case: Case) -> tuple[Range, Range]:
    """Return the tokens that lm-eval passes through one checkpoint, and those that it has generated.

    Of the recipe's own tasks the items are known; how many another has, and how long they are, its data alone says.
    """
    config, sets = case.recipe.evaluation, case.recipe.evaluation_sets
    read, generated = ZERO, ZERO
    if config.lm_eval is None:
        return read, generated
    most = math.inf if config.lm_eval.max_items is None else config.lm_eval.max_items
    for task in config.lm_eval.tasks:
        num_prompts = len(task.prompts)
        if task.name in OWN_REASONING_TASKS:
            families = case.recipe.reasoning_tasks if task.name == OWN_REASONING_TASKS[0] else sets.held_out_tasks
            num_items = min(most, len(families) * sets.reasoning_items_per_task)
            limits = {"on": config.max_new_tokens_on, "off": config.max_new_tokens_off}
            new = sum(limits[prompt] for prompt in task.prompts)
            generated = generated + Range(low=0.1, expected=0.7, high=1.0).times(num_items * new)
            read = read + num_items * num_prompts * PROMPT_TOKENS
        elif task.is_own:
            sizes = {f"{OWN_TASK_PREFIX}{one.name}": one.num_items for one in sets.multiple_choice}
            read = read + min(most, sizes[task.name]) * num_prompts * 2 * BENCHMARK_TOKENS_PER_CHOICE
        else:
            num_examples = 1 + (task.num_fewshot or 0)
            items = Range(low=min(most, 100), expected=min(most, 2000), high=min(most, 20_000))
            read = read + items.times(num_prompts * num_examples * 4 * BENCHMARK_TOKENS_PER_CHOICE)
    return read, generated


def _evaluations(num_parents: int, num_children: int) -> Callable[[Case], Estimate]:
    def evaluations(case: Case) -> Estimate:
        config, sets = case.recipe.evaluation, case.recipe.evaluation_sets
        text = len(sets.held_out) * config.text_tokens_per_set
        choices = sum(one.num_items for one in sets.multiple_choice) * 2 * BENCHMARK_TOKENS_PER_CHOICE
        num_items = (len(case.recipe.reasoning_tasks) + len(sets.held_out_tasks)) * sets.reasoning_items_per_task
        num_items += sets.instructions.num_prompts
        num_items += (7 * config.robustness_items + config.sampled.num_items * config.sampled.num_samples) // 2
        most_new = config.max_new_tokens_on + config.max_new_tokens_off
        generated = Range(low=0.1, expected=0.7, high=1.0).times(num_items * most_new)
        per_checkpoint = generated + text + choices + 2 * num_items * PROMPT_TOKENS
        read, answered = _lm_eval(case)
        is_last_alone = config.lm_eval is not None and config.lm_eval.checkpoints == "last"
        share = 1 / max(1, num_children) if is_last_alone else 1.0
        generated = generated + answered.times(share)
        per_checkpoint = per_checkpoint + (read + answered).times(share)
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


def _export(case: Case) -> Estimate:
    gguf = case.recipe.exported_model.gguf
    gguf_bytes = 0.0 if gguf is None else BYTES_PER_PARAMETER[gguf]
    disk = case.sizes.child_parameters.times(case.stored_bytes + gguf_bytes)
    # Which layers a child has is known when it has been searched: few have all alike.
    llama = case.sizes.child_parameters.high * case.stored_bytes if case.recipe.exported_model.plain_llama else 0.0
    memory = case.sizes.child_parameters.times(4.0)
    return Estimate(
        memory=memory.times(2),
        disk=Range(low=disk.low, expected=disk.expected, high=1.1 * (disk.high + llama)),
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
    "channel_importance": puzzle_estimates.channel_importance,
    "block_library": puzzle_estimates.block_library,
    "block_scores": puzzle_estimates.block_scores,
    "block_profile": puzzle_estimates.block_profile,
    "reasoning_traces": _traces,
    "reasoning_toggle_dataset": _toggle_dataset,
    "rl_prompts": _rl_prompts,
    "parent_evaluation": _evaluations(1, 0),
    "mip_solution": puzzle_estimates.mip_solution,
    "refined_solution": puzzle_estimates.refined_solution,
    "baselines": puzzle_estimates.baselines,
    "child_checkpoint": puzzle_estimates.measured(1, 1, stored_children=1),
    "dependency_matrix": fusion_estimates.dependency_matrix,
    "fused_checkpoint": fusion_estimates.fused_checkpoint,
    "fusion_report": fusion_estimates.fusion_report,
    "kd_checkpoint": training_estimates.kd_checkpoint,
    "cpt_checkpoint": training_estimates.cpt_checkpoint,
    "sft_checkpoint": training_estimates.sft_checkpoint,
    "rl_checkpoint": training_estimates.rl_checkpoint,
    "evaluation": _evaluations(0, 6),
    "speed_report": puzzle_estimates.measured(1, 2, stored_children=0, in_every_backend=True),
    "exported_model": _export,
    "model_card": _page,
    "report": _page,
    "pareto": _page,
}
