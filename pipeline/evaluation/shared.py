"""Evaluations in the artifact store, one per (checkpoint, parent, sets, configuration, harness): measured once, ever.

A new distillation run re-measures what follows it and nothing before; a checkpoint that is byte for byte another one
(a child without a run to fuse) shares its evaluation. The identity of a checkpoint is that of its model and tokenizer
files; what else its artifact holds does not matter here.
"""

import functools
import time
from pathlib import Path

from pipeline.artifacts import MANIFEST, ArtifactStore, Manifest
from pipeline.errors import ArtifactError, CheckpointError
from pipeline.evaluation.perplexity import ParentText
from pipeline.evaluation.results import CheckpointEvaluation, read_evaluations, write_evaluations
from pipeline.evaluation.suite import (
    HARNESS_VERSION,
    Suite,
    evaluate_checkpoint,
    load_for_evaluation,
    load_suite,
    parent_texts,
)
from pipeline.fingerprint import fingerprint
from pipeline.hardware import describe_hardware
from pipeline.model.checkpoint import ARCHITECTURE_FILE, TOKENIZER_FILES
from pipeline.progress import Reporter
from pipeline.recipe import EvaluationConfig
from pipeline.stage import StageInputs, StageResult
from pipeline.training.distributed import use_threads

ASSET = "checkpoint_evaluation"


class Evaluator:
    """Measures checkpoints against one parent; sets and the parent's pass are loaded when the first is measured."""

    def __init__(
        self, *, parent_dir: Path, sets_dir: Path, config: EvaluationConfig, store: ArtifactStore, reporter: Reporter
    ) -> None:
        self._parent_dir = parent_dir
        self._sets_dir = sets_dir
        self._config = config
        self._store = store
        self._reporter = reporter

    @classmethod
    def of(cls, inputs: StageInputs, *, config: EvaluationConfig) -> "Evaluator":
        """Return the evaluator of a stage whose inputs are the parent and the evaluation sets; sets torch's threads."""
        use_threads(inputs.execution.num_threads)
        return cls(
            parent_dir=inputs["parent_checkpoint"],
            sets_dir=inputs["evaluation_sets"],
            config=config,
            store=ArtifactStore(inputs.store_root),
            reporter=inputs.reporter,
        )

    def evaluate(self, name: str, *, checkpoint_dir: Path) -> CheckpointEvaluation:
        """Return the checkpoint's evaluation, from the store where it is there.

        Raises:
            CheckpointError: when the checkpoint has another tokenizer than the parent.
            ArtifactError: when an input has no manifest.
        """
        key = self._key(checkpoint_dir)
        found = self._find(name, key)
        if found is not None:
            return found
        with self._store.locked(ASSET, key, on_wait=self._reporter.note) as directory:
            found = self._find(name, key)  # another process measured it while this one waited for the lock
            if found is not None:
                return found
            began = time.monotonic()
            is_parent = checkpoint_key(checkpoint_dir) == checkpoint_key(self._parent_dir)
            evaluation = evaluate_checkpoint(
                load_for_evaluation(checkpoint_dir, config=self._config),
                name=name,
                suite=self._suite,
                parent=None if is_parent else self._parent_texts,
                reporter=self._reporter,
            )
            write_evaluations(directory, checkpoints={"checkpoint": evaluation})
            self._store.publish(
                ASSET,
                key,
                result=StageResult(
                    metrics={
                        "perplexity": evaluation.text_overall.perplexity.value,
                        "kl": evaluation.text_overall.kl_nats_per_token.value,
                    }
                ),
                wall_s=time.monotonic() - began,
                provenance={"hardware": describe_hardware()},
            )
        return evaluation

    def _find(self, name: str, key: str) -> CheckpointEvaluation | None:
        found = self._store.find(ASSET, key)
        if found is None:
            return None
        self._reporter.note(f"{name} was measured before: {ASSET} {key}")
        return read_evaluations(found.path)["checkpoint"]

    def _key(self, checkpoint_dir: Path) -> str:
        if _tokenizer_hashes(checkpoint_dir) != _tokenizer_hashes(self._parent_dir):
            raise CheckpointError(
                f"{checkpoint_dir} and its parent {self._parent_dir} have different tokenizer files: KL and perplexity "
                "compare the same tokens; use the parent's tokenizer"
            )
        return fingerprint(
            {
                "checkpoint": checkpoint_key(checkpoint_dir),
                "parent": checkpoint_key(self._parent_dir),
                "evaluation_sets": content_hash_of(self._sets_dir),
                # lm-eval's tasks are measured, and kept, apart.
                "config": self._config.model_dump(mode="json", exclude={"lm_eval"}),
                "harness_version": HARNESS_VERSION,
            }
        )

    @functools.cached_property
    def _suite(self) -> Suite:
        return load_suite(self._sets_dir, parent_dir=self._parent_dir, config=self._config)

    @functools.cached_property
    def _parent_texts(self) -> dict[str, ParentText]:
        self._reporter.note("running the parent over the held-out text")
        return parent_texts(load_for_evaluation(self._parent_dir, config=self._config), suite=self._suite)


def checkpoint_key(directory: Path) -> str:
    """Return the hash of a published checkpoint's model and tokenizer files, read from its manifest."""
    files = _manifest(directory).files
    return fingerprint(
        {
            name: entry.sha256
            for name, entry in files.items()
            if name in (ARCHITECTURE_FILE, *TOKENIZER_FILES) or name.startswith("model")
        }
    )


def content_hash_of(directory: Path) -> str:
    """Return the hash of a published artifact's content, read from its manifest."""
    return _manifest(directory).content_hash


def _tokenizer_hashes(directory: Path) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in _manifest(directory).files.items() if name in TOKENIZER_FILES}


def _manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{directory} has no {MANIFEST}: materialize it before it is evaluated")
    return Manifest.model_validate_json(path.read_bytes())
