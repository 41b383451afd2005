"""TrainEngine: one DeepSpeed engine behind the few calls a training makes. Losses, data and loops are elsewhere.

    engine = TrainEngine.create(model, optimizer=..., total_steps=..., ...)
    for each step:
        for each of engine.num_micro_steps micro-batches of engine.micro_batch_size rows:
            engine.backward(contribution of this micro-batch to the loss)
        engine.step()

Contributions ADD UP: the loss of a step is their sum over micro-batches and ranks. A token mean is the micro-batch's
token sum divided by the trained tokens of the whole global batch, so that neither ragged token counts, nor the
micro-batch size, nor the number of ranks changes the gradient.
"""

import contextlib
import gc
import inspect
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import CheckpointError, RecipeError, StageError
from pipeline.progress import Reporter
from pipeline.recipe import OptimizerConfig, Precision
from pipeline.stage import ExecutionSettings
from pipeline.training import checkpoints
from pipeline.training.distributed import World, init_distributed
from pipeline.training.schedules import learning_rate_factor

# DeepSpeed's own default of 5e8 elements is for large GPUs; a rank allocates buffers of this size.
_BUCKET_NUM_ELEMENTS = 10_000_000
_NEVER = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInfo:
    """One optimizer step: its number, counted from 1, and what it was taken with; the norm is before clipping."""

    step: int
    learning_rate: float
    grad_norm: float


class TrainEngine:
    """A model under AdamW and ZeRO. Make one with `create`; every rank calls every method."""

    def __init__(
        self,
        engine: Any,
        *,
        world: World,
        zero_stage: int,
        micro_batch_size: int,
        global_batch_size: int,
        precision: Precision,
    ) -> None:
        self._engine: Any = engine
        self._num_pending = 0
        self.rank = world.rank
        self.world_size = world.world_size
        self.device = world.device
        self.zero_stage = zero_stage
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_micro_steps = global_batch_size // (micro_batch_size * world.world_size)
        self.precision: Precision = precision

    @classmethod
    def create(
        cls,
        model: PreTrainedModel,
        *,
        optimizer: OptimizerConfig,
        total_steps: int,
        precision: Precision,
        execution: ExecutionSettings,
        global_batch_size: int,
    ) -> Self:
        """Put a model under training; parameters without requires_grad stay as they are.

        bf16 computes in bfloat16, adds gradients up in fp32 and keeps fp32 master weights. The model moves
        to the rank's device. Activations that are made again are those that were there, so that the weights that come
        out are the same, bit for bit.

        Raises:
            RecipeError: when the batch does not divide over the ranks.
            StageError: for bf16 with ZeRO stage 0.
        """
        if precision == "bf16" and execution.zero_stage == 0:
            raise StageError(
                "execution.zero_stage is 0 with precision bf16, which DeepSpeed trains with a wrong update "
                "(its issue 7837; losses lag by up to 0.02 in 8 steps): set zero_stage to 1, or precision to fp32"
            )
        world = init_distributed()
        if execution.recompute_activations:
            recompute_activations(model)
        import deepspeed

        initialize: Any = deepspeed.initialize  # its annotations refuse the schedulers that its code takes
        micro_batch_size = choose_micro_batch_size(
            execution.micro_batch_size, global_batch_size=global_batch_size, world_size=world.world_size
        )
        client_optimizer = torch.optim.AdamW(
            _parameter_groups(model, weight_decay=optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            fused=True,
        )
        config = _deepspeed_config(
            model,
            zero_stage=execution.zero_stage,
            precision=precision,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            world_size=world.world_size,
            max_grad_norm=optimizer.max_grad_norm,
        )
        # DeepSpeed's bf16 optimizer prints its memory use here whatever the log level is.
        with contextlib.redirect_stdout(io.StringIO()):
            if execution.zero_stage == 3:
                # Split before the engine is made, which would move the whole model to the device first.
                deepspeed.zero.Init(module=model, config_dict_or_path=config)
            engine, *_ = initialize(
                model=model,
                optimizer=client_optimizer,
                config=config,
                lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(
                    wrapped, lambda step: learning_rate_factor(step, total_steps=total_steps, optimizer=optimizer)
                ),
            )
        return cls(
            engine,
            world=world,
            zero_stage=execution.zero_stage,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            precision=precision,
        )

    @property
    def model(self) -> Any:
        """The model itself: for hooks, generation and evaluation without gradients."""
        return self._engine.module

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken so far, those before a resume included."""
        return int(self._engine.global_steps)

    def forward(self, **inputs: Any) -> Any:
        """Run the model with gradients; what `backward` is given must come from here."""
        if not self.model.training:
            self.model.train()  # sampling and scoring leave it in evaluation, in which no layer is run again
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's scalar contribution to the step's loss."""
        if self._num_pending >= self.num_micro_steps:
            raise StageError(f"backward was called more than {self.num_micro_steps} times before step")
        if self._num_pending:
            self._engine.step()  # advances DeepSpeed's count of micro steps; updates nothing before the last one
        # DeepSpeed divides by micro steps and averages over ranks; contributions are meant to add up.
        self._engine.backward(loss * (self.num_micro_steps * self.world_size))
        self._num_pending += 1

    def step(self) -> StepInfo:
        """Clip the gradients, update the weights, advance the schedule."""
        if self._num_pending != self.num_micro_steps:
            raise StageError(f"step was called after {self._num_pending} of {self.num_micro_steps} micro-batches")
        learning_rate = float(self._engine.get_lr()[0])
        # At stage 0 DeepSpeed clips, but does not keep the norm.
        grad_norm = self._plain_grad_norm() if self.zero_stage == 0 else None
        self._engine.step()
        self._num_pending = 0
        if grad_norm is None:
            grad_norm = float(self._engine.get_global_grad_norm())
        return StepInfo(step=self.num_steps, learning_rate=learning_rate, grad_norm=grad_norm)

    def save(self, directory: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint to resume from, with `state` as JSON; the two newest are kept.

        Raises:
            ArtifactError: when the disk cannot hold it.
        """
        checkpoints.save(
            directory,
            step=self.num_steps,
            layout=self._layout(),
            state=state,
            needed_bytes=self._checkpoint_bytes(),
            write=lambda path: self._engine.save_checkpoint(str(path), tag=checkpoints.TAG, save_latest=False),
        )

    def load_latest(self, directory: Path, *, reporter: Reporter) -> dict[str, Any] | None:
        """Restore the newest complete checkpoint and return its state; None when there is none.

        Raises:
            CheckpointError: when none is whole, or it was written under another number of ranks, ZeRO stage,
                micro-batch size or precision.
        """
        found = checkpoints.newest(directory, layout=self._layout())
        if found is None:
            return None
        for told in found.passed_over:
            reporter.note(f"{told}: it is removed, and training continues from the one before it")
        with contextlib.redirect_stdout(io.StringIO()):
            loaded, _ = self._engine.load_checkpoint(str(found.path), tag=checkpoints.TAG)
        # DeepSpeed says with a warning, or with None, that it took less than the whole state.
        if loaded is None or self.num_steps != found.manifest.step:
            raise CheckpointError(
                f"DeepSpeed restored step {self.num_steps} from {found.path}, which holds step {found.manifest.step}: "
                "delete it to continue from the checkpoint before it"
            )
        return found.manifest.state

    def set_master_weights(self, read: Callable[[str], Tensor]) -> None:
        """Give the trained parameters' fp32 masters their values: `read(name)` at full precision, one at a time.

        For bf16, whose masters DeepSpeed clones from the rounded weights of the model; call it before the first step
        and before `load_latest`. What the model computes with is left as it is. Works at ZeRO 1, 2 and 3 and with any
        number of ranks, each of which reads everything and keeps its part.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.zero_stage < 3:
                safe_set_full_fp32_param(parameter, read(name))
            else:
                # The call for whole tensors fails at stage 3 when the ranks do not divide the tensor.
                num_elements = parameter.ds_tensor.numel()
                whole = read(name).flatten()
                padded = nn.functional.pad(whole, (0, num_elements * self.world_size - whole.numel()))
                safe_set_local_fp32_param(parameter, padded.narrow(0, num_elements * self.rank, num_elements))

    def exported_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained parameters one at a time in fp32 on the CPU, from the master weights.

        Every rank goes through to the end, and rank 0 alone gets any. Tied parameters appear once, under the first of
        their names.
        """
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.model.named_parameters():
            plain = self.zero_stage == 0 or not parameter.requires_grad
            # At stage 3 a frozen matrix, which has no master, is empty between two passes.
            with deepspeed.zero.GatheredParameters([parameter], enabled=plain and self.zero_stage == 3):
                full: Any = parameter.detach() if plain else safe_get_full_fp32_param(parameter)
                copied = full.to(device="cpu", dtype=torch.float32, copy=True) if self.rank == 0 else None
            if copied is not None:
                yield name, copied

    def close(self) -> None:
        """Let go of the model and its optimizer; the process group stays, since it cannot be started twice."""
        close_deepspeed(self._engine)
        self._engine = None

    def _plain_grad_norm(self) -> float:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def _layout(self) -> checkpoints.Layout:
        return checkpoints.Layout(
            world_size=self.world_size,
            zero_stage=self.zero_stage,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            precision=self.precision,
        )

    def _checkpoint_bytes(self) -> int:
        num_parameters = sum(
            int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in self.model.parameters()
        )
        weight_bytes = 2 if self.precision == "bf16" else 4
        return num_parameters * (weight_bytes + 12)  # weights, fp32 masters, two AdamW moments


def close_deepspeed(engine: Any) -> None:
    """Take DeepSpeed's hooks off a model and its buffers away, so that the model can be freed.

    DeepSpeed 0.19.8 keeps every model that it has split over ranks alive in two places: a list of modules, from which
    it takes none, and the cache of a method, whose arguments they are.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    module = engine.module
    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [other for other in stack if other is not module]
    wrapper = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(wrapper).nonlocals["func"].cache_clear()


def release_memory() -> None:
    """Free what closed engines held: DeepSpeed's hooks keep a model in cycles, and torch keeps freed device memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def recompute_activations(model: PreTrainedModel) -> None:
    """Let every layer keep its input alone in a pass with gradients, and run again when they are asked for.

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost; a layer is a segment.
    """
    # Reentrant, it would need an input that has a gradient; and no layer draws random numbers.
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})


def choose_micro_batch_size(wanted: int, *, global_batch_size: int, world_size: int) -> int:
    """Return the largest micro-batch of at most `wanted` rows whose multiple over all ranks is the global batch.

    Raises:
        RecipeError: when the ranks do not divide the global batch.
    """
    rows_per_rank, rest = divmod(global_batch_size, world_size)
    if rest:
        raise RecipeError(
            f"global_batch_size is {global_batch_size} rows, which {world_size} ranks do not divide: "
            f"run with {math.gcd(global_batch_size, world_size)} ranks, or change global_batch_size"
        )
    return max(size for size in range(1, min(wanted, rows_per_rank) + 1) if rows_per_rank % size == 0)


def zero_config(model: nn.Module, *, zero_stage: int) -> dict[str, Any]:
    """Return DeepSpeed's `zero_optimization` for a model that is not split yet."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage > 0:
        zero |= {"reduce_bucket_size": _BUCKET_NUM_ELEMENTS, "allgather_bucket_size": _BUCKET_NUM_ELEMENTS}
    if zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": _BUCKET_NUM_ELEMENTS,
            # Norms stay whole on every rank, matrices are split: gathering a vector costs more than keeping it.
            "stage3_param_persistence_threshold": max(
                (parameter.numel() for parameter in model.parameters() if parameter.ndim < 2), default=0
            ),
        }
    return zero


def _parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _deepspeed_config(
    model: nn.Module,
    *,
    zero_stage: int,
    precision: Precision,
    micro_batch_size: int,
    global_batch_size: int,
    world_size: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": global_batch_size // (micro_batch_size * world_size),
        "gradient_clipping": max_grad_norm,
        "steps_per_print": _NEVER,
        "zero_optimization": zero_config(model, zero_stage=zero_stage),
        "zero_allow_untested_optimizer": True,
    }
    if precision == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config
