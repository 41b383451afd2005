"""block_scores killed at random moments: the table it ends with is that of an undisturbed run, byte for byte."""

import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifacts import ArtifactStore
from pipeline.puzzle.known_scores import KNOWN
from pipeline.puzzle.tables import DEPTH, SCORES
from pipeline.recipe import BlockScoresConfig, SearchSpaceConfig
from pipeline.stage import ExecutionSettings
from pipeline.stages import block_library, block_scores
from pipeline.stages.configs import BlockLibraryStage, BlockScoresStage
from pipeline.stages.spec import SPEC_FILE
from tests.pipeline.puzzle.line import BLD as LINE_BLD
from tests.pipeline.puzzle.workplace import Workplace, publish
from tests.pipeline.training.builders import write_spec

SPACE = SearchSpaceConfig(
    attention=("parent", 1, "linear", "no_op"), ffn=("parent", 32, 16, "linear", "no_op"), overrides=(), portable=False
)
BLD = LINE_BLD.model_copy(update={"tokens": 32})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_block_scores_killed_at_random_ends_with_the_table_of_an_undisturbed_run(workplace: Workplace, tmp_path: Path):
    store = ArtifactStore(workplace.store_root)
    library_dir = store.directory("block_library", "killed")
    library = block_library.run(
        BlockLibraryStage(search_space=SPACE, block_library=BLD), workplace.inputs(), library_dir
    )
    publish(store, "block_library", "killed", library)
    config = BlockScoresStage(
        search_space=SPACE, block_scores=BlockScoresConfig(tokens=64, depth_steps=3, task=None, precision="fp32")
    )
    # Nothing fits in memory: files of states are there to be left behind.
    execution = ExecutionSettings(num_threads=1, max_activation_mib=0)
    inputs = replace(workplace.inputs(block_library=library_dir), execution=execution)
    began = time.monotonic()
    undisturbed = block_scores.run(config, inputs, tmp_path / "calm")
    spent_s = time.monotonic() - began

    out_dir = tmp_path / "disturbed"
    spec_path = write_spec(out_dir / "_work" / SPEC_FILE, config, inputs, out_dir=out_dir)
    command = [sys.executable, "-m", "pipeline.stages", "block_scores", "--spec", str(spec_path)]
    rng, layers_left = random.Random(0), []
    kept = "_work/layer-*.json"
    for pattern, number in ((kept, 0), (kept, 1), (kept, 2), ("_work/depth-1-*/layer-*.json", 1)):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not _has_come(out_dir, pattern=pattern, number=number):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, spent_s / 10))
            process.kill()  # nothing, where the run was over first
        layers_left.append(len(list(out_dir.glob(kept))))
    assert any(0 < count < 3 for count in layers_left)  # some kill fell between two layers
    assert layers_left == sorted(layers_left)  # what is finished is never lost
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for name in (SCORES, DEPTH, KNOWN):
        assert (out_dir / name).read_bytes() == (tmp_path / "calm" / name).read_bytes(), name
    assert undisturbed.metrics["num_candidates"] == 3 * 19


def _has_come(out_dir: Path, *, pattern: str, number: int) -> bool:
    """Return whether a run has written its first states and finished so many layers of these."""
    has_states = bool(list(out_dir.glob("_work/**/activations/*")))
    return len(list(out_dir.glob(pattern))) >= number and has_states
