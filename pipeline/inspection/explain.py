"""Whether each stage of a target would be reused, resumed or run, and the first thing that differs from last time.

The present identity of a stage (version, recipe slice, content of its inputs, hardware, local files) is compared with
the one written down beside the newest earlier artifact of the same asset. Nothing is written into the store and no
lock is taken.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.architecture import Frozen
from pipeline.artifacts import IDENTITY, MANIFEST, PROGRESS, Artifact
from pipeline.errors import ArtifactError
from pipeline.execution import Workspace, failed_blocking_check, has_saved_work, stage_identity
from pipeline.fingerprint import canonical_json, fingerprint
from pipeline.runtimes import RuntimeMissingError
from pipeline.stages.registry import STAGES, Stage

Action = Literal["reuse", "resume", "run", "blocked"]

# In the order in which a difference is worth telling.
_PARTS = ("version", "config", "hardware", "environment", "inputs", "results")


class Explanation(Frozen):
    """What would happen to one stage, why, and how many further differences there are."""

    stage: str
    action: Action
    reason: str
    num_more: int = 0


def explain(workspace: Workspace, *, target: str) -> tuple[Explanation, ...]:
    """Return, inputs first, what materializing every stage of a target would do.

    Raises:
        RecipeError: when the recipe has no such target.
    """
    found: dict[str, Artifact] = {}
    explanations: dict[str, Explanation] = {}
    for stage in STAGES:
        explanation, artifact = _explain_stage(workspace, stage, target, found=found, earlier=explanations)
        explanations[stage.name] = explanation
        if artifact is not None:
            found[stage.name] = artifact
    return tuple(explanations.values())


def render_explanations(explanations: Sequence[Explanation]) -> str:
    """Return one line per stage and a count of each action."""
    width = max(len(one.stage) for one in explanations)
    lines = []
    for one in explanations:
        more = f" (and {one.num_more} more)" if one.num_more else ""
        lines.append(f"{one.stage:<{width}}  {one.action:<7}  {one.reason}{more}".rstrip())
    counts = {
        action: sum(one.action == action for one in explanations) for action in ("reuse", "resume", "run", "blocked")
    }
    summary = ", ".join(f"{count} {action}" for action, count in counts.items() if count)
    return "\n".join([*lines, "", summary])


def _explain_stage(
    workspace: Workspace,
    stage: Stage,
    target: str,
    *,
    found: Mapping[str, Artifact],
    earlier: Mapping[str, Explanation],
) -> tuple[Explanation, Artifact | None]:
    blocked = next((name for name in stage.upstream if earlier[name].action == "blocked"), None)
    if blocked is not None:
        return Explanation(stage=stage.name, action="blocked", reason=f"its input {blocked} is blocked"), None
    missing = [name for name in stage.upstream if name not in found]
    if missing:
        return _explain_without_inputs(workspace, stage, target, missing=missing), None
    for name in stage.upstream:
        failure = failed_blocking_check(found[name], workspace.recipe)
        if failure is not None:
            reason = f"input {name} fails its blocking check {failure}"
            return Explanation(stage=stage.name, action="blocked", reason=reason), None
    try:
        identity = stage_identity(workspace, stage, target)
        key = fingerprint(identity)
        artifact = workspace.store.find(stage.name, key)
    except (ArtifactError, RuntimeMissingError) as err:
        return Explanation(stage=stage.name, action="blocked", reason=str(err)), None
    if artifact is not None:
        failure = failed_blocking_check(artifact, workspace.recipe)
        reason = "" if failure is None else f"but it fails its blocking check {failure}: nothing may read it"
        return Explanation(stage=stage.name, action="reuse", reason=reason), artifact
    out_dir = workspace.store.directory(stage.name, key)
    if has_saved_work(out_dir):
        return Explanation(stage=stage.name, action="resume", reason=_saved_progress(out_dir)), None
    reason, num_more = _first_difference(workspace, stage, target, identity)
    return Explanation(stage=stage.name, action="run", reason=reason, num_more=num_more), None


def _explain_without_inputs(workspace: Workspace, stage: Stage, target: str, *, missing: Sequence[str]) -> Explanation:
    """Explain a stage whose inputs are still to be made: its own settings may differ, too."""
    present = json.loads(canonical_json({"version": stage.version, "config": stage.config(workspace.recipe, target)}))
    before = _nearest_identity(workspace, stage, target)
    changes = [] if before is None else _differences({part: before.get(part) for part in present}, present)
    if changes:
        return Explanation(stage=stage.name, action="run", reason=changes[0], num_more=len(changes) - 1 + len(missing))
    reason = f"input {missing[0]} will be made first"
    if before is not None:
        reason += "; reused after all if that comes out as before"
    return Explanation(stage=stage.name, action="run", reason=reason, num_more=len(missing) - 1)


def _first_difference(workspace: Workspace, stage: Stage, target: str, identity: Mapping[str, Any]) -> tuple[str, int]:
    before = _nearest_identity(workspace, stage, target)
    if before is None:
        return "never made before", 0
    changes = _differences(before, identity)
    return (changes[0], len(changes) - 1) if changes else ("its artifact was removed", 0)


def _nearest_identity(workspace: Workspace, stage: Stage, target: str) -> dict[str, Any] | None:
    """Return the identity of an asset's newest finished artifact, this recipe's and target's before any other's."""
    candidates = []
    for path in (workspace.store.root / stage.name).glob(f"*/{IDENTITY}"):
        manifest = path.with_name(MANIFEST)
        if not manifest.is_file():
            continue
        try:
            record = json.loads(path.read_bytes())
            is_same_recipe = record["recipe"] == workspace.recipe.name
            is_same_target = not stage.per_target or record["target"] == target
            candidates.append(((is_same_recipe and is_same_target, manifest.stat().st_mtime), record["identity"]))
        except (OSError, ValueError, KeyError):
            continue  # it says nothing; the doctor tells of broken artifacts
    return max(candidates, key=lambda one: one[0])[1] if candidates else None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return every leaf that differs, as `path: old -> new`, the most telling part first."""
    changes: list[str] = []
    for part in _PARTS:
        for path, old, new in _changed_leaves(before.get(part, {}), now.get(part, {}), path=part):
            if part in ("inputs", "results"):
                name, other = path.removeprefix(f"{part}."), "content" if part == "inputs" else "results"
                changes.append(f"input {name} has other {other}: {_hash(old)} -> {_hash(new)}")
            else:
                changes.append(f"{path}: {_spelled(old)} -> {_spelled(new)}")
    return changes


def _changed_leaves(old: Any, new: Any, *, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for key in sorted(old.keys() | new.keys())
            for change in _changed_leaves(old.get(key), new.get(key), path=f"{path}.{key}")
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            change
            for index, (one, other) in enumerate(zip(old, new, strict=True))
            for change in _changed_leaves(one, other, path=f"{path}[{index}]")
        ]
    return [] if old == new else [(path, old, new)]


def _spelled(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = "absent" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hash(value: Any) -> str:
    return "absent" if value is None else str(value)[:8]


def _saved_progress(out_dir: Path) -> str:
    """Return how far an unfinished run came, from the last line of its progress."""
    try:
        lines = (out_dir / PROGRESS).read_text(encoding="utf-8").splitlines()
        last = next(line for line in (json.loads(text) for text in reversed(lines)) if "step" in line)
    except (OSError, ValueError, StopIteration):
        return "an unfinished run left work to continue from"
    return f"an unfinished run came to {last['what']} {last['step']} of {last['total']}"
