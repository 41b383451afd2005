"""Writes docs/recipe.md, every key a recipe has, from the models that read recipes: `make reference`."""

import inspect
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.recipe import Recipe
from pipeline.recipe_file import find_recipe

OUT = Path(__file__).parent / "recipe.md"
EXAMPLE = "smol"
HEAD = f"""# Every key of a recipe

Written by `make reference` from the models that read recipes (`pipeline/recipe/`); a test holds it to them. Examples
are those of [`{EXAMPLE}`](../pipeline/recipes/{EXAMPLE}.yaml). Every key is required unless it has a default, and an
unknown one is refused with the nearest that there is. The [user guide](user-guide.md) says what the stages do.
"""
PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


class Page:
    """The page as it grows; a model that several keys share is described under the first of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._heading_of: dict[type[BaseModel], str] = {}

    def table(self, fields: dict[str, FieldInfo], example: Any, *, key: str = "") -> None:
        """Write a row for every field, with links to the models that stand under it."""
        self.lines += ["", "| key | takes | example |", "| --- | --- | --- |"]
        for name, field in fields.items():
            taken = _taken(field)
            for model in _models(field.annotation):
                heading = self._heading_of.setdefault(model, f"{key}.{name}{_suffix(model, field.annotation)}")
                taken = taken.replace(model.__name__, f"[{heading}](#{_anchor(heading)})")
            is_leaf = name in example and not _models(field.annotation)
            self.lines.append(f"| `{name}` | {taken} | {_shown(example[name]) if is_leaf else ''} |")

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
            for name, inner in model.model_fields.items():
                self.section(f"{heading}.{name}", inner, found.get(name), level=min(level + 1, 4))


def make() -> str:
    """Return the page."""
    example = yaml.safe_load(find_recipe(EXAMPLE).read_text(encoding="utf-8"))
    page = Page()
    page.lines += ["", "## The recipe itself"]
    scalars = {name: field for name, field in Recipe.model_fields.items() if not _models(field.annotation)}
    page.table(scalars, example)
    for name, field in Recipe.model_fields.items():
        page.section(name, field, example.get(name), level=2)
    return HEAD + "\n".join(page.lines) + "\n"


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
    text = _type(field.annotation) + _bounds(field.metadata)
    if not field.is_required():
        text += f", default {_shown(field.default)}"
    return text + (f": {field.description}" if field.description else "")


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
    OUT.write_text(make(), encoding="utf-8")
