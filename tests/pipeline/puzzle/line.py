"""The stages before the search, run once on the tiny parent, and those behind it as functions of a target."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import ArtifactStore
from pipeline.recipe import (
    BlockLibraryConfig,
    BlockScoresConfig,
    Limit,
    PoolConfig,
    ProfileConfig,
    RefinementConfig,
    Requirements,
    Scenario,
    SearchConfig,
    SearchSpaceConfig,
    SpeedReportConfig,
)
from pipeline.stage import StageResult
from pipeline.stages import (
    block_library,
    block_profile,
    block_scores,
    child_checkpoint,
    mip_solution,
    refined_solution,
)
from pipeline.stages.configs import (
    BlockLibraryStage,
    BlockProfileStage,
    BlockScoresStage,
    ChildStage,
    MipStage,
    RefinedStage,
)
from tests.pipeline.puzzle.workplace import Workplace, publish

SPACE = SearchSpaceConfig(attention=("parent", 1, "no_op"), ffn=("parent", 16, "no_op"), overrides=(), portable=False)
BLD = BlockLibraryConfig(
    mode="decoupled",
    coupled_space=None,
    tokens=96,
    closed_form_tokens=0,
    loss="tensor",
    batch_size=2,
    learning_rate=3e-3,
    min_learning_rate_ratio=0.1,
    warmup_ratio=0.0,
    schedule="cosine",
    weight_decay=0.0,
    betas=(0.9, 0.95),
    max_grad_norm=1.0,
    overrides=(),
    precision="fp32",
)
PROFILE = ProfileConfig(
    backend="torch",
    scenarios=(Scenario(name="chat", batch_size=1, prompt_tokens=12, generation_tokens=4),),
    precision="fp32",
    served_precision="fp32",
    num_threads=1,
    warmups=1,
    repeats=5,
)
SEARCH = SearchConfig(
    objective="kl",
    layers="heterogeneous",
    pool=PoolConfig(num_solutions=3, max_overlap=0.7),
    refinement=RefinementConfig(
        tokens=32, tokens_per_round=32, path_steps=1, rounds=2, answers_per_step=1, max_changed_layers=2
    ),
    batch_choice="lowest_loss",
    time_limit_s=10,
    relative_gap=0.0,
    max_recalibrations=2,
    speed_margin=0.0,
    speed_tolerance=0.05,
)
SPEED = SpeedReportConfig(rounds=3, warmups=1, device_memory_gib=0.5, backends=("torch",), depths=(5,))


def target(*limits: Limit) -> Requirements:
    return Requirements(limits=limits, pins=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The artifacts of the stages before the search."""

    workplace: Workplace
    library_dir: Path
    library: StageResult
    scores_dir: Path
    scores: StageResult
    profile_dir: Path
    profile: StageResult
    profile_config: ProfileConfig = PROFILE

    def mip(self, wanted: Requirements, out_dir: Path) -> StageResult:
        """Solve for a target."""
        config = MipStage(target_name="t", requirements=wanted, search=SEARCH, profile=self.profile_config)
        inputs = self.workplace.inputs(block_scores=self.scores_dir, block_profile=self.profile_dir)
        return mip_solution.run(config, inputs, out_dir)

    def refined(self, wanted: Requirements, mip_dir: Path, out_dir: Path) -> StageResult:
        """Score the pool as whole models and improve the best."""
        config = RefinedStage(
            search_space=SPACE,
            target_name="t",
            requirements=wanted,
            search=SEARCH,
            profile=self.profile_config,
            task=None,
            precision="fp32",
        )
        inputs = self.workplace.inputs(
            mip_solution=mip_dir,
            block_scores=self.scores_dir,
            block_profile=self.profile_dir,
            block_library=self.library_dir,
        )
        return refined_solution.run(config, inputs, out_dir)

    def child(self, wanted: Requirements, mip_dir: Path, out_dir: Path) -> StageResult:
        """Refine, assemble and measure."""
        refined_dir = out_dir.parent / f"{out_dir.name}-refined"
        self.refined(wanted, mip_dir, refined_dir)
        config = ChildStage(
            target_name="t",
            requirements=wanted,
            search=SEARCH,
            profile=self.profile_config,
            measurement=SPEED.measurement,
        )
        inputs = self.workplace.inputs(
            refined_solution=refined_dir, block_profile=self.profile_dir, block_library=self.library_dir
        )
        return child_checkpoint.run(config, inputs, out_dir)


def make_line(workplace: Workplace) -> Line:
    """Run the library, the scores and the profile."""
    store = ArtifactStore(workplace.store_root)
    library_dir, scores_dir, profile_dir = (
        store.directory(asset, "x") for asset in ("block_library", "block_scores", "block_profile")
    )
    library = block_library.run(
        BlockLibraryStage(search_space=SPACE, block_library=BLD), workplace.inputs(), library_dir
    )
    publish(store, "block_library", "x", library)
    scores = block_scores.run(
        BlockScoresStage(
            search_space=SPACE, block_scores=BlockScoresConfig(tokens=32, depth_steps=2, task=None, precision="fp32")
        ),
        workplace.inputs(block_library=library_dir),
        scores_dir,
    )
    profile = block_profile.run(BlockProfileStage(search_space=SPACE, profile=PROFILE), workplace.inputs(), profile_dir)
    return Line(
        workplace=workplace,
        library_dir=library_dir,
        library=library,
        scores_dir=scores_dir,
        scores=scores,
        profile_dir=profile_dir,
        profile=profile,
    )
