"""Reading a recipe from its YAML file: by name or path, no key given twice, every wrong key named."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.wrong_keys import wrong_keys

_BOOL = "tag:yaml.org,2002:bool"
RECIPES_DIR = Path(__file__).parent / "recipes"


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe by name (`smol`) or by path (`my/recipe.yaml`).

    Raises:
        RecipeError: when there is no such file, it is not YAML, or a key is unknown, missing or of the wrong value; or
            when it is a changed copy of a shipped recipe that still has its name.
    """
    path = find_recipe(name_or_path)
    recipe = _read_recipe(path)
    shipped = RECIPES_DIR / f"{recipe.name}.yaml"
    if shipped.is_file() and not path.samefile(shipped) and recipe != _read_recipe(shipped):
        raise RecipeError(
            f"{path} says `name: {recipe.name}`, and the shipped recipe of that name says something else: artifacts "
            "belong to a name, so `doctor --remove-garbage` would take those of one for leftovers of the other; give "
            f"it a name of its own, like `name: my-{recipe.name}`"
        )
    return recipe


def _read_recipe(path: Path) -> Recipe:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except UnicodeDecodeError as err:
        raise RecipeError(f"{path} is not UTF-8 text: {err}") from err
    except OSError as err:
        raise RecipeError(f"{path} cannot be read: {err}") from err
    except (yaml.YAMLError, RecursionError) as err:
        raise RecipeError(f"{path} is not valid YAML: {err}") from err
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds a {type(data).__name__}; a recipe is a mapping of sections")
    return parse_recipe(data, origin=str(path))


def parse_recipe(data: dict[str, Any], *, origin: str) -> Recipe:
    """Validate the plain form of a recipe.

    Raises:
        RecipeError: listing every key that is wrong.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as err:
        lines = [f"  {line}" for line in wrong_keys(err, data)]
        raise RecipeError(f"{origin} is not a valid recipe:\n" + "\n".join(lines)) from err


def require_target(recipe: Recipe, target: str) -> None:
    """Refuse a target that the recipe does not have.

    Raises:
        RecipeError: listing those it has.
    """
    if target not in recipe.targets:
        raise RecipeError(f"recipe {recipe.name} has no target {target!r}; it has {', '.join(sorted(recipe.targets))}")


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe given by name or path.

    Raises:
        RecipeError: when there is none, listing the shipped recipes.
    """
    if re.fullmatch(r"[A-Za-z0-9._-]+", name_or_path):
        shipped = RECIPES_DIR / f"{name_or_path}.yaml"
        if shipped.is_file():
            return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    names = sorted(file.stem for file in RECIPES_DIR.glob("*.yaml"))
    raise RecipeError(f"no recipe {name_or_path!r}: give a path to a YAML file, or one of {', '.join(names)}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, which YAML would otherwise settle silently.

    Words are words: `on`, `off`, `yes` and `no`, which YAML 1.1 reads as true and false, stay what they are.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  as the base class has it
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_UniqueKeyLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|false)$"), list("tf"))
