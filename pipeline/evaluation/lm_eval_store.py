"""lm-eval's measurements in the artifact store, one per (checkpoint, task, prompt): measured once, ever.

A task added to a recipe is measured alone; a changed task file, or anything beside it, measures its tasks anew.
LM_EVAL_VERSION is raised by hand whenever a score would come out differently for the same checkpoint and task.
"""

import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import ArtifactStore, sha256_file
from pipeline.data.chat import stop_token_ids
from pipeline.data.evaluation_sets import load_held_out_items, load_multiple_choice, load_reasoning_items
from pipeline.evaluation.lm_eval_results import LmEvalResult, read_lm_eval, write_lm_eval
from pipeline.evaluation.lm_eval_runner import harness_model, load_inline, load_task, require_lm_eval, run_task
from pipeline.evaluation.shared import checkpoint_key, content_hash_of
from pipeline.evaluation.suite import load_for_evaluation
from pipeline.evaluation.task_files import files_read_by
from pipeline.fingerprint import fingerprint
from pipeline.hardware import describe_hardware
from pipeline.model.checkpoint import load_tokenizer
from pipeline.progress import Reporter
from pipeline.recipe import (
    OWN_REASONING_TASKS,
    OWN_TASK_PREFIX,
    EvaluationConfig,
    LmEvalConfig,
    LmEvalPrompt,
    LmEvalTask,
)
from pipeline.stage import StageInputs, StageResult
from pipeline.training.distributed import use_threads

ASSET = "checkpoint_lm_eval"
LM_EVAL_VERSION = 1

_TASKS_DIR = Path(__file__).parent / "lm_eval_tasks"


class LmEvaluator:
    """Measures checkpoints on the recipe's lm-eval tasks; a model is loaded when a task of it is not in the store."""

    def __init__(
        self, *, sets_dir: Path, config: EvaluationConfig, asked: LmEvalConfig, store: ArtifactStore, reporter: Reporter
    ) -> None:
        self._sets_dir = sets_dir
        self._config = config
        self._asked = asked
        self._store = store
        self._reporter = reporter
        self._lm_eval_version = require_lm_eval()

    @classmethod
    def of(cls, inputs: StageInputs, *, config: EvaluationConfig) -> "LmEvaluator | None":
        """Return the evaluator of a stage that reads the evaluation sets, None when its recipe does not ask lm-eval.

        Raises:
            UserError: when lm-eval is asked and not installed.
        """
        if config.lm_eval is None:
            return None
        use_threads(inputs.execution.num_threads)
        return cls(
            sets_dir=inputs["evaluation_sets"],
            config=config,
            asked=config.lm_eval,
            store=ArtifactStore(inputs.store_root),
            reporter=inputs.reporter,
        )

    def evaluate(self, name: str, *, checkpoint_dir: Path) -> tuple[LmEvalResult, ...]:
        """Return every task's result under every prompt it is asked with, from the store where it is there.

        Raises:
            DataError: when a task is unknown or its data cannot be read.
            ArtifactError: when an input has no manifest.
        """
        model = functools.cache(lambda: load_for_evaluation(checkpoint_dir, config=self._config))
        pairs: list[tuple[LmEvalTask, LmEvalPrompt]] = [
            (task, prompt) for task in self._asked.tasks for prompt in task.prompts
        ]
        results = []
        for number, (task, prompt) in enumerate(pairs, start=1):
            results.append(self._evaluate_one(task, prompt, checkpoint_dir=checkpoint_dir, model=model))
            self._reporter.step(number, len(pairs), what=f"lm-eval tasks of {name}")
        return tuple(results)

    def _evaluate_one(
        self, task: LmEvalTask, prompt: LmEvalPrompt, *, checkpoint_dir: Path, model: Any
    ) -> LmEvalResult:
        key = fingerprint(
            {
                "checkpoint": checkpoint_key(checkpoint_dir),
                "task": task.name,
                "prompt": prompt,
                "num_fewshot": task.num_fewshot,
                "max_items": self._asked.max_items,
                "seed": self._asked.seed,
                "data": content_hash_of(self._sets_dir) if task.is_own else self._file_hashes,
                "settings": self._config.model_dump(
                    mode="json", include={"precision", "batch_size", "max_new_tokens_on", "max_new_tokens_off"}
                ),
                "lm_eval": self._lm_eval_version,
                "version": LM_EVAL_VERSION,
            }
        )
        found = self._find(task, prompt, key=key)
        if found is not None:
            return found
        with self._store.locked(ASSET, key, on_wait=self._reporter.note) as directory:
            found = self._find(task, prompt, key=key)  # another process measured it while this one waited for the lock
            if found is not None:
                return found
            began = time.monotonic()
            result = self._measure(task, prompt, checkpoint_dir=checkpoint_dir, model=model())
            write_lm_eval(directory, checkpoints={"checkpoint": (result,)})
            self._store.publish(
                ASSET,
                key,
                result=StageResult(metrics={f"{score.task} {score.name}": score.value for score in result.scores}),
                wall_s=time.monotonic() - began,
                provenance={"hardware": describe_hardware()},
            )
        return result

    def _find(self, task: LmEvalTask, prompt: LmEvalPrompt, *, key: str) -> LmEvalResult | None:
        found = self._store.find(ASSET, key)
        if found is None:
            return None
        self._reporter.note(f"{task.name}, {prompt}, was measured before: {ASSET} {key}")
        return read_lm_eval(found.path)["checkpoint"][0]

    def _measure(self, task: LmEvalTask, prompt: LmEvalPrompt, *, checkpoint_dir: Path, model: Any) -> LmEvalResult:
        # One of its own for every task: lm-eval sets the padding of the tokenizer it is given.
        tokenizer = load_tokenizer(checkpoint_dir)
        stop_ids = stop_token_ids(tokenizer, model.architecture.eos_token_ids)
        config = self._config
        with contextlib.ExitStack() as stack:
            loaded = (
                load_inline(
                    stack.enter_context(
                        own_task(
                            task.name,
                            sets_dir=self._sets_dir,
                            stop_texts=[str(tokenizer.decode([stop_id])) for stop_id in stop_ids],
                            max_new_tokens=config.max_new_tokens_on if prompt == "on" else config.max_new_tokens_off,
                        )
                    )
                )
                if task.is_own
                else load_task(task, include_path=self._asked.include_path)
            )
            run = run_task(
                loaded,
                lm=harness_model(model, tokenizer=tokenizer, batch_size=config.batch_size),
                prompt=prompt,
                num_fewshot=task.num_fewshot,
                max_items=self._asked.max_items,
                seed=self._asked.seed,
            )
        return LmEvalResult(
            task=task.name,
            prompt=prompt,
            num_fewshot=task.num_fewshot,
            lm_eval_version=self._lm_eval_version,
            task_versions=run.task_versions,
            scores=run.scores,
        )

    @functools.cached_property
    def _file_hashes(self) -> list[str]:
        if self._asked.include_path is None:
            return []
        return sorted(sha256_file(path) for path in files_read_by(self._asked.include_path))


@contextlib.contextmanager
def own_task(name: str, *, sets_dir: Path, stop_texts: Sequence[str], max_new_tokens: int) -> Iterator[dict[str, Any]]:
    """Give one of the recipe's evaluation sets as a mapping in the form of a task file; its data lives as long."""
    if name in OWN_REASONING_TASKS:
        load = load_reasoning_items if name == OWN_REASONING_TASKS[0] else load_held_out_items
        rows = [{"question": item.question.strip(), "answer": item.answer} for item in load(sets_dir)]
        config = _template("reasoning.yaml")
        config["generation_kwargs"] |= {"until": list(stop_texts), "max_gen_toks": max_new_tokens}
    else:
        items = load_multiple_choice(sets_dir)[name.removeprefix(OWN_TASK_PREFIX)]
        rows = [item.model_dump(mode="json") for item in items]
        config = _template("multiple_choice.yaml")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "items.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        yield {
            **config,
            "task": name,
            # Beside the items, so that nothing is left in the user's cache.
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": directory},
        }


def _template(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((_TASKS_DIR / name).read_text(encoding="utf-8"))
    return config
