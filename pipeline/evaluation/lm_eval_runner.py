"""lm-eval's library on a model in memory: one task under one prompt, its scores and its items. No files but task files.

lm-eval is an extra and untyped, so its names are looked up here, in one place, when they are first needed.
"""

import contextlib
import difflib
import functools
import importlib
import os
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import TEMPLATE_DATE, THINK_CLOSE, THINKING_OFF, THINKING_ON
from pipeline.errors import DataError, UserError
from pipeline.evaluation.lm_eval_results import LmEvalScore
from pipeline.evaluation.task_files import LOCAL_READERS, names_of, read_task_files
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.recipe import LmEvalPrompt, LmEvalTask

SYSTEM_PROMPTS: dict[LmEvalPrompt, str | None] = {"plain": None, "on": THINKING_ON, "off": THINKING_OFF}
# Resamples behind the standard error of a metric that is no mean (F1, BLEU); of a mean it is in closed form.
_BOOTSTRAP_RESAMPLES = 1000
# What lm-eval seeds its few-shot examples with.
_FEWSHOT_SEED = 1234


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRun:
    """What lm-eval found: scores, versions of the tasks, and its log of every item by task."""

    scores: tuple[LmEvalScore, ...]
    task_versions: dict[str, str]
    items: Mapping[str, list[dict[str, Any]]]


def require_lm_eval() -> str:
    """Return lm-eval's version.

    Raises:
        UserError: when it is not installed, with how to install it.
    """
    try:
        found = version("lm-eval")
        importlib.import_module("lm_eval.models.huggingface")
    except (PackageNotFoundError, ImportError) as err:
        raise UserError(
            f"evaluation.lm_eval asks for lm-eval, which cannot be imported ({err}): run `make install-lm-eval`, or "
            "set evaluation.lm_eval to null"
        ) from err
    return found


def harness_model(model: HeterogeneousLlamaForCausalLM, *, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> Any:
    """Return a model as lm-eval drives it; lm-eval may give the tokenizer a padding token.

    Log-softmax is in fp32 whatever the model's dtype, as in the project's own scorer. Replies are cut behind </think>.
    """
    return importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        softmax_dtype="float32",
        max_length=model.architecture.max_position_embeddings,
        think_end_token=THINK_CLOSE,
        chat_template_args={"date_string": TEMPLATE_DATE},
        trust_remote_code=False,
    )


def load_task(task: LmEvalTask, *, include_path: str | None) -> dict[str, Any]:
    """Return a task by name as lm-eval's library loads it: from the recipe's task files first, then from its own.

    Raises:
        DataError: for an unknown name, naming the closest, or when the task's data cannot be read.
    """
    own_names = [] if include_path is None else names_of(read_task_files(include_path))
    manager = _manager(include_path, with_defaults=False) if task.name in own_names else None
    if manager is None or manager.task_index[task.name].kind.name in ("GROUP", "TAG"):
        manager = _manager(include_path, with_defaults=True)  # a group may name tasks of lm-eval's own
    if task.name not in manager.task_index:
        closest = difflib.get_close_matches(task.name, manager.all_tasks, n=3)
        raise DataError(
            f"lm-eval {version('lm-eval')} has no task {task.name!r}"
            + (f"; the closest are {', '.join(closest)}" if closest else "")
            + (f"; include_path has {', '.join(own_names)}" if own_names else "; include_path names no task files")
        )
    return _load(manager, task.name, origin=_dataset_of(manager.task_index[task.name].cfg))


def load_inline(config: dict[str, Any]) -> dict[str, Any]:
    """Return the task that a mapping in the form of a task file defines."""
    return _load(_manager(None, with_defaults=False), config, origin=_dataset_of(config))


def run_task(
    loaded: dict[str, Any],
    *,
    lm: Any,
    prompt: LmEvalPrompt,
    num_fewshot: int | None,
    max_items: int | None,
    seed: int,
) -> TaskRun:
    """Ask a loaded task; of more than `max_items` items of a task, so many are drawn."""
    for task in loaded["tasks"].values():
        if num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    with _seeded(seed), _no_pools(), contextlib.redirect_stdout(sys.stderr):
        results = importlib.import_module("lm_eval.evaluator").evaluate(
            lm=lm,
            task_dict=loaded,
            samples=_drawn(loaded["tasks"], max_items=max_items, seed=seed),
            bootstrap_iters=_BOOTSTRAP_RESAMPLES,
            log_samples=True,
            system_instruction=SYSTEM_PROMPTS[prompt],
            apply_chat_template=prompt != "plain",
        )
    return TaskRun(
        scores=tuple(_scores(results)),
        task_versions={name: str(found) for name, found in results["versions"].items()},
        items=results["samples"],
    )


def _load(manager: Any, what: str | dict[str, Any], *, origin: str | None) -> dict[str, Any]:
    name = what if isinstance(what, str) else what["task"]
    try:
        loaded: dict[str, Any] = manager.load([what])
    except Exception as err:
        step = (
            "mend the task file or its data"
            if origin is None
            else f"it reads the data set {origin} of the Hugging Face hub: set HF_HUB_OFFLINE=0 where there is a "
            "network, or fill the cache (HF_HOME) there, or write a task file over local files"
        )
        raise DataError(f"lm-eval cannot load task {name} ({type(err).__name__}: {err}); {step}") from err
    return loaded


def _dataset_of(config: Mapping[str, Any] | None) -> str | None:
    """Return the hub's data set that a task reads, None where its files are local or it does not say."""
    path = (config or {}).get("dataset_path")
    return path if isinstance(path, str) and path not in LOCAL_READERS else None


@functools.cache
def _manager(include_path: str | None, *, with_defaults: bool) -> Any:
    # lm-eval's own index takes 8 seconds to build: 14,683 tasks in 0.4.13.
    tasks = importlib.import_module("lm_eval.tasks")
    return tasks.TaskManager(include_path=include_path, include_defaults=with_defaults)


def _drawn(tasks: Mapping[str, Any], *, max_items: int | None, seed: int) -> dict[str, list[int]] | None:
    if max_items is None:
        return None
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    return {
        name: sorted(random.Random(seed).sample(range(size), k=min(size, max_items))) for name, size in sizes.items()
    }


def _scores(results: Mapping[str, Any]) -> Iterator[LmEvalScore]:
    sizes = results["n-samples"]
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        parts = results["group_subtasks"].get(task) or [task]
        num_items = sum(sizes[part]["effective"] for part in _leaves(parts, results) if part in sizes)
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            yield LmEvalScore(
                task=task,
                metric=metric,
                filter=filter_name,
                value=float(value),
                stderr=None if stderr is None or isinstance(stderr, str) else float(stderr),
                num_items=num_items,
            )


def _leaves(names: list[str], results: Mapping[str, Any]) -> Iterator[str]:
    for name in names:
        below = results["group_subtasks"].get(name)
        if below:
            yield from _leaves(below, results)
        else:
            yield name


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what lm-eval and a task may draw with, and give the rest of the process its own state back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _no_pools() -> Iterator[None]:
    """Have lm-eval resample in this process: a fork of one that holds a model may hang."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
