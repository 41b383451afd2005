"""What every stage is given and what it gives back. No torch, no Dagster.

A stage is `run(config, inputs, out_dir) -> StageResult`. It writes under `out_dir` only:

    out_dir/             the artifact's files, hashed into its content
    out_dir/view/        figures for people; published, but not part of the content hash
    out_dir/_work/       checkpoints to resume from; removed when the artifact is published
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pipeline.architecture import Frozen
from pipeline.progress import Reporter, SilentReporter

WORK_DIR = "_work"
VIEW_DIR = "view"
TARGET_MARK = "@"

Number = int | float


class ExecutionSettings(Frozen):
    """Where and how a stage runs: nothing here changes what an artifact means, so nothing here is fingerprinted."""

    launcher: Literal["in_process", "local", "slurm"] = Field(
        default="local",
        description="`in_process` runs every stage in the process that materializes it, whatever num_ranks is; `local` "
        "starts ranks by torchrun on this machine; `slurm` starts them by srun on the nodes of a job",
    )
    num_nodes: int = Field(default=1, ge=1, description="nodes of the Slurm job, over which ranks are spread evenly")
    srun_options: tuple[str, ...] = Field(
        default=(), description="further options of srun, such as --network=... or --mpi=none"
    )
    num_ranks: int = Field(
        default=1,
        ge=1,
        description="processes of a stage on all ranks, of all nodes together; every other stage runs in one",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="DeepSpeed ZeRO of every training but block distillation: 0 splits nothing over the ranks, 1 the "
        "optimizer, 2 gradients too, 3 weights too; 0 is refused with bf16, 3 by rl_checkpoint",
    )
    micro_batch_size: int = Field(
        default=4,
        ge=1,
        description="most windows (in reinforcement learning, replies or pairs of them) that a rank of every training "
        "but block distillation takes at once; lowered to what divides its share of a batch, and for longer windows",
    )
    recompute_activations: bool = Field(
        default=False,
        description="trainings but block distillation keep each layer's input alone and run the layer again for its "
        "gradient",
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="torch threads per rank; null: the machine's cores, shared out where a node has several ranks",
    )
    checkpoint_interval_steps: int = Field(
        default=10, ge=1, description="optimizer steps between two checkpoints to resume from"
    )
    block_memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="GiB per rank for blocks in distillation and the sums of their closed-form start; more are trained "
        "in rounds; null: all at once",
    )
    sampler: Literal["torch", "vllm"] = Field(
        default="torch",
        description="what reinforcement learning samples with; another one gives other replies; vllm needs make "
        "install-vllm",
    )
    sample_interval_steps: int = Field(
        default=10, ge=1, description="steps of reinforcement learning between two completions that the log shows"
    )
    grace_seconds: float = Field(default=15.0, gt=0, description="seconds between asking a stage to stop and making it")
    requests_per_minute: float | None = Field(
        default=None, gt=0, description="requests to each endpoint; null: no limit"
    )
    requests_in_flight: int = Field(default=8, ge=1, description="requests to an endpoint at once")
    request_timeout_s: float = Field(default=600.0, gt=0, description="seconds that an endpoint may take to answer")
    max_activation_mib: int = Field(
        default=4096,
        ge=0,
        description="MiB of hidden states that scoring, layer influence and, on every rank, the closed-form start keep "
        "in memory; the rest lies in files meanwhile",
    )

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        if self.num_nodes > 1 and self.launcher != "slurm":
            raise ValueError(f"num_nodes is {self.num_nodes}, which takes launcher: slurm; got {self.launcher}")
        if self.num_ranks % self.num_nodes:
            raise ValueError(
                f"num_ranks is {self.num_ranks}, which num_nodes = {self.num_nodes} does not divide: "
                "give all ranks together, as many on each node"
            )
        return self

    @property
    def ranks_per_node(self) -> int:
        """As many as a node has GPUs."""
        return self.num_ranks // self.num_nodes

    @property
    def max_activation_bytes(self) -> int:
        """The same in bytes; what is above lies in files."""
        return self.max_activation_mib * 2**20


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """What a stage reads beside its config: upstream artifacts by asset name, the shared store, and who listens."""

    artifacts: Mapping[str, Path]
    store_root: Path
    downloads: Path
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)
    reporter: Reporter = field(default_factory=SilentReporter)

    def __getitem__(self, asset: str) -> Path:
        """Return the directory of an upstream artifact."""
        return self.artifacts[asset]

    def by_target(self, asset: str) -> dict[str, Path]:
        """Return the directories of an asset that is read of every target; a target without one is left out."""
        keys = {key: key.partition(TARGET_MARK) for key in self.artifacts}
        return {target: self.artifacts[key] for key, (name, _, target) in keys.items() if name == asset and target}


def target_key(asset: str, target: str) -> str:
    """Return the name under which the artifact of one of several targets is handed to a stage: `baselines@fast`."""
    return f"{asset}{TARGET_MARK}{target}"


class Table(Frozen):
    """A small table for people: column names carry their units."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | bool | None, ...], ...]

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[Sequence[str | int | float | bool | None]]) -> "Table":
        """Build a table from any sequences."""
        return cls(columns=tuple(columns), rows=tuple(tuple(row) for row in rows))


class StageResult(Frozen):
    """What a stage found out, for checks, reports and the UI; the artifact's files hold everything else.

    `metrics` are numbers, one per tracked quantity, named with their unit; asset checks compare them with the recipe's
    thresholds. `facts` are short strings. `figures` are paths below `view/`.
    """

    # A loss that is NaN must fail its check, not make its own record unreadable: JSON would turn it into null.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    metrics: dict[str, Number] = Field(default_factory=dict)
    facts: dict[str, str] = Field(default_factory=dict)
    tables: dict[str, Table] = Field(default_factory=dict)
    markdown: dict[str, str] = Field(default_factory=dict)
    figures: dict[str, str] = Field(default_factory=dict)
