"""Writes the pages that the code holds: keys of a recipe, execution settings, stages. `make reference`."""

import inspect
import re
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.data.benchmarks import BENCHMARKS
from pipeline.data.embedded import EMBEDDED
from pipeline.devices import DEVICES
from pipeline.model.architecture_files import ARCHITECTURES_DIR
from pipeline.reasoning.traces import SOLVERS
from pipeline.recipe import (
    REFUSED_TASKS,
    EmbeddedSource,
    HubParent,
    MultipleChoiceSet,
    ProfileConfig,
    ReasoningTask,
    Recipe,
    SearchSpaceConfig,
    WheelParent,
)
from pipeline.recipe.puzzle import PRESETS
from pipeline.recipe_file import find_recipe
from pipeline.stage import ExecutionSettings
from pipeline.stages.registry import STAGES

DOCS = Path(__file__).parent
EXAMPLE = "smol"
RECIPE_HEAD = f"""# Every key of a recipe

Written by `make reference` from the models that read recipes (`pipeline/recipe/`); a test holds it to them. Examples
are those of [`{EXAMPLE}`](../pipeline/recipes/{EXAMPLE}.yaml). Every key is required unless it has a default, and an
unknown one is refused with the nearest that there is. The [user guide](user-guide.md) says what the stages do, and
[stages.md](stages.md) lists them. How a recipe runs is in the [execution settings](execution.md).

Sections of papers are those of Puzzle ([arXiv 2411.19146](https://arxiv.org/abs/2411.19146)), FFN Fusion
([arXiv 2503.18908](https://arxiv.org/abs/2503.18908)) and Llama-Nemotron
([arXiv 2505.00949](https://arxiv.org/abs/2505.00949)).
"""
EXECUTION_HEAD = """# Every execution setting

Written by `make reference` from the model that reads them (`pipeline/stage.py`); a test holds it to that. They say
where and how stages run: on a server or a cluster, see [cluster.md](cluster.md).

`REFIT_EXECUTION` names a YAML file of them. A setting that the file leaves out keeps its default, and without a file
all do. An unknown one is refused.

Nothing here is part of an artifact's identity: an artifact that is there is reused, whatever the settings were when it
was made. Its manifest records them. Results may differ in rounding when ranks, threads, `zero_stage` or
`micro_batch_size` differ. `sampler` changes more than that: reinforcement learning learns from other replies.

A training that was stopped continues under the same `num_ranks`, `zero_stage`, `micro_batch_size` and `sampler`, and
is refused under others. Block distillation continues on any number of ranks.
"""
STAGES_HEAD = """# Every stage

Written by `make reference` from the registry (`pipeline/stages/registry.py`); a test holds it to that. The names are
what `make materialize SELECT=...` takes, alone or with commas between them. `SELECT='*name'` is a stage with
everything that it needs, `SELECT='name*'` one with everything that reads it. A selection with a stage that is made once
per target needs `TARGET=...` as well.

A stage on all ranks runs in `num_ranks` processes, as the [execution settings](execution.md) say. Every other stage
runs in one, however many ranks there are.
"""
PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


class Page:
    """The page as it grows; a model that several keys share is described under the first of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._heading_of: dict[type[BaseModel], str] = {}

    def table(self, fields: dict[str, FieldInfo], example: Any, *, key: str = "") -> None:
        """Write a row for every field, with links to the models that stand under it."""
        rows = []
        for name, field in fields.items():
            taken = _taken(field) if field.is_required() else f"{_taken(field)}, default {_default(field)}"
            for model in _models(field.annotation):
                heading = self._heading_of.setdefault(model, f"{key}.{name}{_suffix(model, field.annotation)}")
                taken = taken.replace(model.__name__, f"[{heading}](#{_anchor(heading)})")
            is_leaf = name in example and not _models(field.annotation)
            rows.append((f"`{name}`", taken, field.description or "", _shown(example[name]) if is_leaf else ""))
        self.lines += _table(("key", "takes", "meaning", "example"), rows)

    def section(self, key: str, field: FieldInfo, example: Any, *, level: int) -> None:
        """Describe the models under a key, and those under theirs, where this key is the first to have them."""
        for model in _models(field.annotation):
            heading = f"{key}{_suffix(model, field.annotation)}"
            first = self._heading_of.setdefault(model, heading)
            if first != heading:
                if level == 2:
                    self.lines += ["", f"## {heading}", "", f"As [{first}](#{_anchor(first)})."]
                continue
            found = _inner(example, model)
            self.lines += ["", f"{'#' * level} {heading}", "", *inspect.cleandoc(model.__doc__ or "").splitlines()]
            self.table(model.model_fields, found, key=heading)
            self.lines += _CHOICES.get(model, list)()
            for name, inner in model.model_fields.items():
                self.section(f"{heading}.{name}", inner, found.get(name), level=min(level + 1, 4))


def make_recipe_page() -> str:
    """Return the page of a recipe's keys."""
    example = yaml.safe_load(find_recipe(EXAMPLE).read_text(encoding="utf-8"))
    page = Page()
    page.lines += ["", "## The recipe itself"]
    scalars = {name: field for name, field in Recipe.model_fields.items() if not _models(field.annotation)}
    page.table(scalars, example)
    for name, field in Recipe.model_fields.items():
        page.section(name, field, example.get(name), level=2)
    return _joined(RECIPE_HEAD, page.lines)


def make_execution_page() -> str:
    """Return the page of the execution settings."""
    rows = [
        (f"`{name}`", _taken(field), _default(field), field.description or "")
        for name, field in ExecutionSettings.model_fields.items()
    ]
    return _joined(EXECUTION_HEAD, _table(("setting", "takes", "default", "meaning"), rows))


def make_stages_page() -> str:
    """Return the page of the stages, in the registry's order."""
    rows = [
        (
            f"`{stage.name}`",
            stage.description,
            "target" if stage.per_target else "recipe",
            "all ranks" if stage.runs_on_all_ranks else "one rank",
        )
        for stage in STAGES
    ]
    return _joined(STAGES_HEAD, _table(("stage", "what it makes", "made once per", "runs on"), rows))


PAGES: dict[Path, Callable[[], str]] = {
    DOCS / "recipe.md": make_recipe_page,
    DOCS / "execution.md": make_execution_page,
    DOCS / "stages.md": make_stages_page,
}


def _embedded() -> list[str]:
    # Not `origin`: it names the version of the interpreter that writes the page.
    rows = [
        (
            f"`{source.name}`",
            "the standard library of the Python that runs" if source.requirement is None else source.origin,
            source.licence,
        )
        for source in EMBEDDED.values()
    ]
    return ["", "The texts that there are:", *_table(("name", "origin", "licence"), rows)]


def _benchmarks() -> list[str]:
    rows = [(f"`{one.name}`", f"`{one.member}`", one.licence) for one in BENCHMARKS.values()]
    told = "The benchmarks that there are; the first part of a file's path is the wheel that it comes in:"
    return ["", told, *_table(("name", "file", "licence and items"), rows)]


def _tasks() -> list[str]:
    # Two stars of a power would be bold type.
    refused = [(f"`{name}`", one.why.replace("*", "\\*"), f"`{one.instead}`") for name, one in REFUSED_TASKS.items()]
    return [
        "",
        "A task of `reasoning_tasks` needs a solver, which writes its steps for reasoning_traces. These have one: "
        f"{_listed(SOLVERS)}. `evaluation_sets.held_out_tasks` takes any task of reasoning-gym that is not refused.",
        "",
        "What is refused:",
        *_table(("task", "why", "take instead"), refused),
    ]


def _presets() -> list[str]:
    rows = [
        (f"`{name}`", _shown(list(lists["attention"])), _shown(list(lists["ffn"]))) for name, lists in PRESETS.items()
    ]
    return ["", "What `preset` stands for:", *_table(("preset", "attention", "ffn"), rows)]


def _devices() -> list[str]:
    rows = [
        (
            f"`{one.name}`",
            f"{one.peak_flops_per_s / 1e12:g}",
            f"{one.bandwidth_bytes_per_s / 1e12:g}",
            "yes" if one.computes_fp8 else "no",
        )
        for one in DEVICES.values()
    ]
    columns = ("device", "bf16 peak, TFLOP/s", "memory bandwidth, TB/s", "computes in fp8")
    return ["", "The devices that there are:", *_table(columns, rows)]


def _architectures() -> list[str]:
    return ["", f"Shipped architectures: {_listed(path.stem for path in ARCHITECTURES_DIR.glob('*.json'))}."]


# What a key of these may name, from the tables that are looked up.
_CHOICES: dict[type[BaseModel], Callable[[], list[str]]] = {
    WheelParent: _architectures,
    HubParent: _architectures,
    EmbeddedSource: _embedded,
    ReasoningTask: _tasks,
    MultipleChoiceSet: _benchmarks,
    SearchSpaceConfig: _presets,
    ProfileConfig: _devices,
}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return ["", *(f"| {' | '.join(cells)} |" for cells in lines)]


def _joined(head: str, lines: Sequence[str]) -> str:
    return head + "\n".join(lines) + "\n"


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _suffix(model: type[BaseModel], annotation: Any) -> str:
    """Say how a model stands under its key: in a list, under a name, or as one of several kinds."""
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if model in _models(part)]
    kinds = model.model_fields.get("kind")
    if origin in (Union, types.UnionType) and kinds is not None and len(_models(annotation)) > 1:
        return f" ({' or '.join(map(str, get_args(kinds.annotation)))})"
    stands = {tuple: "[]", dict: ".NAME"}.get(origin, "")
    return stands + (_suffix(model, parts[0]) if parts else "")


def _inner(value: Any, model: type[BaseModel]) -> dict[str, Any]:
    """Return the first example of a model under a key's value; an empty one where there is none."""
    values = [value]
    if isinstance(value, list):
        values = value
    elif isinstance(value, dict) and not set(value) & set(model.model_fields):
        values = list(value.values())
    kinds = model.model_fields.get("kind")
    wanted = None if kinds is None else get_args(kinds.annotation)
    fitting = (one for one in values if isinstance(one, dict) and (not wanted or one.get("kind") in wanted))
    return next(fitting, {})


def _taken(field: FieldInfo) -> str:
    text, null = _type(field.annotation), " or null"
    return text.removesuffix(null) + _bounds(field.metadata) + (null if text.endswith(null) else "")


def _default(field: FieldInfo) -> str:
    value = field.default
    return _shown(list(value) if isinstance(value, tuple) else value)


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(parts[0]) + "".join(
            _bounds(one.metadata if isinstance(one, FieldInfo) else [one]) for one in parts[1:]
        )
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin is tuple:
        return f"a list of {_type(parts[0])}" if parts[-1] is ... else " and ".join(_type(part) for part in parts)
    if origin is dict:
        return f"a mapping of names to {_type(parts[1])}"
    return PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: list[Any]) -> str:
    relations, lengths = [], ""
    for one in metadata:
        match one:
            case annotated_types.Ge():
                relations.append(f" ≥ {one.ge}")
            case annotated_types.Gt():
                relations.append(f" > {one.gt}")
            case annotated_types.Le():
                relations.append(f" ≤ {one.le}")
            case annotated_types.Lt():
                relations.append(f" < {one.lt}")
            case annotated_types.MinLen():
                lengths = f", at least {one.min_length}"
            case _:
                pass
    return " and".join(relations) + lengths


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).replace("\n...", "").strip()
    return f"`{text}`" if len(text) <= 60 else f"`{text[:57]}...`"


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    for path, make in PAGES.items():
        path.write_text(make(), encoding="utf-8")
