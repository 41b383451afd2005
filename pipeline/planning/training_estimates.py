"""What the trainings compute, read, hold and write, as estimates does for the other stages."""

from pathlib import Path

from pipeline.costs import BYTES_PER_PARAMETER, kv_bytes_per_token
from pipeline.planning import devices
from pipeline.planning.case import DISK, PROMPT_TOKENS, START_S, Case, Estimate
from pipeline.planning.memory import sampled_logit_bytes, training_peak_bytes
from pipeline.planning.ranges import ZERO, Range
from pipeline.recipe import DistillationConfig, MixtureConfig, Precision, PretrainingConfig, Recipe, RLConfig
from pipeline.stage import ExecutionSettings

NUM_RESUME_CHECKPOINTS = 2
MAX_SHARED_TOKENS = 512  # of a sequence of several replies to one prompt; pipeline.reasoning.policy


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
        flops = flops + sizes.child_flops(context_tokens=length).times(_passes_of_training(execution) * tokens)
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


def _passes_of_training(execution: ExecutionSettings) -> float:
    """Return forward and backward pass in forward passes; the backward pass makes two products for each one."""
    return 4.0 if execution.recompute_activations else 3.0


def micro_batch_rows(wanted: int, *, global_batch_size: int, num_ranks: int) -> int:
    """Return the rows that a rank passes through at once: pipeline.training.engine's rule, without its torch."""
    rows_per_rank = max(1, global_batch_size // num_ranks)
    return max(rows for rows in range(1, min(wanted, rows_per_rank) + 1) if rows_per_rank % rows == 0)


def _phases(config: DistillationConfig | PretrainingConfig, mixture: MixtureConfig) -> list[tuple[int, int, int]]:
    later = [(phase.tokens, phase.sequence_length, phase.global_batch_size) for phase in config.long_context]
    return [(config.tokens, mixture.sequence_length, config.global_batch_size), *later]


def kd_checkpoint(case: Case) -> Estimate:
    """Return what distillation costs, the teacher beside the student."""
    config = case.recipe.kd
    phases = _phases(config, case.recipe.distillation_mix)
    return _training(case, phases=phases, precision=config.precision, with_teacher=True)


def cpt_checkpoint(case: Case) -> Estimate:
    """Return what continued pre-training costs."""
    config = case.recipe.cpt
    phases = _phases(config, case.recipe.pretraining_mix)
    return _training(case, phases=phases, precision=config.precision, with_teacher=False)


def sft_checkpoint(case: Case) -> Estimate:
    """Return what fine-tuning costs, stage by stage."""
    config = case.recipe.sft
    window = case.recipe.reasoning_toggle_dataset.sequence_length
    phases = [(part.tokens, window, part.global_batch_size) for part in config.stages]
    return _training(case, phases=phases, precision=config.precision, with_teacher=False)


def num_rl_prompts(recipe: Recipe) -> int:
    """Return how many prompts reinforcement learning has, those held out included."""
    return len(recipe.reasoning_tasks) * recipe.rl_prompts.items_per_task + recipe.rl_prompts.instructions.num_prompts


def rl_checkpoint(case: Case) -> Estimate:
    """Return what sampling, scoring and training on replies costs."""
    config, sizes, ranks = case.recipe.rl, case.sizes, case.execution.num_ranks
    num_samples = config.steps * config.prompts_per_step * config.samples_per_prompt
    longest = config.max_new_tokens
    new = Range(low=0.15 * longest, expected=0.6 * longest, high=longest)  # answers end before the limit, or do not
    sampled = new.times(num_samples)
    length = PROMPT_TOKENS + longest
    child = sizes.child_flops(context_tokens=length)
    batch = max(1, config.prompts_per_step * config.samples_per_prompt // config.updates_per_rollout)
    micro_rows = micro_batch_rows(case.execution.micro_batch_size, global_batch_size=batch, num_ranks=ranks)
    # Rows of a micro-batch that have the same prompt read it once, as far as they fit one sequence.
    fitting = (MAX_SHARED_TOKENS - PROMPT_TOKENS) / new.expected
    per_prompt = max(1.0, min(micro_rows, config.samples_per_prompt / config.updates_per_rollout, fitting))
    rows = sampled + num_samples * PROMPT_TOKENS / per_prompt
    passed = rows.times(3.0)  # sampling, old log-probabilities, the reference
    tried = ZERO
    if config.difficulty is not None:
        num_tried = num_rl_prompts(case.recipe) - config.held_out.num_prompts
        tried = new.times(num_tried * config.difficulty.num_samples) + num_tried * PROMPT_TOKENS
    updated = rows.times(_passes_of_training(case.execution))
    training, forward = (
        Range(low=tokens.low * child.low, expected=tokens.expected * child.expected, high=tokens.high * child.high)
        for tokens in (updated, passed + tried)
    )
    reward_model = _reward_model_bytes(config)
    judging = (sampled + num_samples * PROMPT_TOKENS).times(2.0 * reward_model / BYTES_PER_PARAMETER["bf16"])
    size = BYTES_PER_PARAMETER[config.precision]
    steps = new.times(config.steps)
    weights = sizes.child_parameters
    read = Range(
        low=steps.low * weights.low * size,
        expected=steps.expected * weights.expected * size,
        high=steps.high * weights.high * size,
    ).times(ranks)  # every rank reads its own copy
    trained = _training(case, phases=[(1, length, batch)], precision=config.precision, with_teacher=False)
    samples_at_once = config.prompts_per_step * config.samples_per_prompt / ranks
    cache = samples_at_once * length * kv_bytes_per_token(sizes.parent, bytes_per_value=size)
    reference = weights.times(size)
    parts = {
        **trained.memory_parts,
        "logits": sampled_logit_bytes(sizes.parent, num_tokens=micro_rows * longest, precision=config.precision),
        "reference": reference.expected,
        **({"reward model": reward_model} if reward_model else {}),
        "sampling cache": cache * sizes.expected_share,
    }
    updating = parts["logits"] + parts["activations"]
    peak = sum(parts.values())
    return Estimate(
        tokens=rows + tried,
        work=((forward + judging, devices.FORWARD), (training, devices.TRAINING)),
        read_bytes=read,
        memory=Range(
            low=min(peak, trained.memory.low + reference.low),
            expected=peak,
            high=max(peak, trained.memory.high + reference.high + updating) + cache + reward_model,
        ),
        memory_parts=parts,
        disk=trained.disk,
        working_disk=trained.working_disk,
        extra_s=trained.extra_s,
        on_all_ranks=True,
    )


def _reward_model_bytes(config: RLConfig) -> float:
    """Return the size of the reward model's files, which are taken for bf16 weights; 0 where there are none to see."""
    if config.reward_model is None:
        return 0.0
    directory = Path(config.reward_model.path).expanduser()
    return float(sum(file.stat().st_size for file in directory.glob("*.safetensors")))
