"""`python -m pipeline push` against a hub on this machine: what it sends, refuses, and never tells."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.artifacts import Artifact
from pipeline.cli import main
from pipeline.execution import find_artifact, stage_fingerprint
from pipeline.stage import StageResult
from pipeline.stages.launch import REPOSITORY
from pipeline.stages.registry import STAGES, get_stage
from tests.dagster.stores import open_tiny, publish
from tests.pipeline.hub_server import TOKEN, HubServer, running_hub

WEIGHTS = bytes(range(256)) * 16
FILES = {"config.json": b"{}\n", "model.safetensors": WEIGHTS, "llama/config.json": b"{ }\n"}
EXPORT = FILES | {"view/figure.svg": b"<svg/>"}
CARD = b"---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


def publish_files(home: Path, stage_name: str, files: dict[str, bytes], **metrics: float) -> Artifact:
    """Publish an artifact with these files, its metrics at the bounds of its checks or as given."""
    workspace, stage = open_tiny(home), get_stage(stage_name)
    key = stage_fingerprint(workspace, stage, "light")
    directory = workspace.store.directory(stage_name, key)
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    at_bounds = {check.metric: check.bound_for(workspace.recipe) for check in stage.checks}
    result = StageResult(metrics=at_bounds | metrics, facts={})
    return workspace.store.publish(stage_name, key, result=result, wall_s=1.0, provenance={})


@pytest.fixture(scope="module")
def whole_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with every stage of the target `light`; the export and the card have files of their own."""
    home = tmp_path_factory.mktemp("home")
    for stage in STAGES:
        if stage.name == "exported_model":
            publish_files(home, stage.name, EXPORT)
        elif stage.name == "model_card":
            publish_files(home, stage.name, {"model_card.md": CARD})
        else:
            publish(open_tiny(home), stage, target="light")
    return home


@pytest.fixture
def exported(whole_target: Path, tmp_path: Path) -> Artifact:
    """Publish the whole target below `tmp_path` and return its exported model."""
    shutil.copytree(whole_target, tmp_path, dirs_exist_ok=True)
    artifact = find_artifact(open_tiny(tmp_path), "exported_model", "light")
    assert artifact is not None
    return artifact


@dataclass
class Pushed:
    """What a command answered."""

    code: int
    out: str
    err: str


PushTo = Callable[..., Pushed]


def push_apart(home: Path, hub: HubServer, *arguments: str) -> Pushed:
    """Run the command in a process of its own, its hub and its token in the environment alone."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_DEBUG": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    env |= {"RECIPE": "tiny", "REFIT_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pipeline", "push", "--target", "light", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY, env=env, timeout=240)
    return Pushed(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def push(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> PushTo:
    """Run the command in this process, for what is refused; whatever it prints must be free of the token."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # as `make test` sets it
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("RECIPE", "tiny")
    monkeypatch.setenv("REFIT_HOME", str(tmp_path))

    def run(*arguments: str) -> Pushed:
        code: object = 0
        try:
            main(["push", "--target", "light", "--repo", *arguments])
        except SystemExit as end:
            code = end.code
        printed = capfd.readouterr()
        # Python prints the message of an exit that is no number, and ends with 1.
        said = code if isinstance(code, str) else ""
        assert TOKEN not in printed.out + printed.err + said
        return Pushed(1 if said else int(str(code)), printed.out, printed.err + said)

    return run


def test_push_makes_a_private_repository_with_the_files_and_the_card(
    tmp_path: Path, hub: HubServer, exported: Artifact
):
    done = push_apart(tmp_path, hub, "--repo", "somebody/small-model")

    assert done.code == 0, done.err
    assert TOKEN not in done.out + done.err
    assert hub.creations == [{"name": "small-model", "organization": "somebody", "visibility": "private"}]
    assert hub.repositories == {"somebody/small-model": True}
    assert hub.files == FILES | {"README.md": CARD}
    assert hub.commits == [f"tiny, target light: {exported.content_hash}"]
    assert done.out.startswith("pushed 4 files to somebody/small-model, private: http://127.0.0.1:")
    # The hub itself gets the token, or a push to the real one would be refused; the storage of large files does not.
    sent = dict(zip(hub.requests, hub.tokens, strict=True))
    assert sent["POST", "/api/repos/create"] == f"Bearer {TOKEN}"
    assert [token for (method, _), token in sent.items() if method == "PUT"] == [None]


@pytest.mark.usefixtures("exported")
def test_public_is_asked_for_by_name_and_files_that_are_there_are_replaced(tmp_path: Path, hub: HubServer):
    hub.repositories["somebody/small-model"] = False
    hub.files |= {"config.json": b"an older one", "other.txt": b"kept"}
    done = push_apart(tmp_path, hub, "--repo", "somebody/small-model", "--public")
    assert done.code == 0, done.err
    assert [request["visibility"] for request in hub.creations] == ["public"]
    assert hub.files == FILES | {"README.md": CARD, "other.txt": b"kept"}
    assert ", public: " in done.out


@pytest.mark.parametrize(
    ("is_private", "arguments", "message"),
    [
        (False, [], "is there already and public, nothing was pushed: say --public if everybody may have this model"),
        (True, ["--public"], "is there already and private, nothing was pushed: leave out --public"),
    ],
)
@pytest.mark.usefixtures("exported")
def test_repository_of_the_other_visibility_gets_nothing(
    hub: HubServer, push: PushTo, is_private: bool, arguments: list[str], message: str
):
    hub.repositories["somebody/small-model"] = is_private
    done = push("somebody/small-model", *arguments)
    assert done.code == 1
    assert message in done.err
    assert hub.files == {}
    assert hub.repositories == {"somebody/small-model": is_private}


@pytest.mark.parametrize(
    "path",
    ["/api/repos/create", "/api/models/somebody/small-model/preupload/main"],
)
@pytest.mark.usefixtures("exported")
def test_refusal_that_quotes_the_token_is_told_without_it(hub: HubServer, push: PushTo, path: str):
    hub.refusals[path] = 403
    done = push("somebody/small-model")
    assert done.code == 1
    assert "somebody/small-model cannot be pushed to the Hugging Face hub (" in done.err
    assert "the token <token> may not do this" in done.err
    assert hub.files == {}


@pytest.mark.usefixtures("exported")
def test_hub_out_of_reach_is_an_error_of_ours(push: PushTo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    done = push("somebody/small-model")
    assert done.code == 1
    assert "cannot be pushed to the Hugging Face hub (" in done.err


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"num_token_id_differences": 3}, "exported_model failed its blocking check chat_renders_the_same"),
        ({"max_abs_logit_difference": 5.0}, "exported_model failed its blocking check export_computes_the_same"),
    ],
)
def test_export_that_failed_a_blocking_check_stays_here(
    tmp_path: Path, hub: HubServer, push: PushTo, metrics: dict[str, float], message: str
):
    publish_files(tmp_path, "exported_model", EXPORT, **metrics)
    done = push("somebody/small-model")
    assert done.code == 1
    assert message in done.err
    assert hub.requests == []


def test_export_that_was_changed_after_it_was_made_stays_here(exported: Artifact, hub: HubServer, push: PushTo):
    (exported.path / "model.safetensors").write_bytes(WEIGHTS[::-1])
    done = push("somebody/small-model")
    assert done.code == 1
    assert "the file was changed after it was published" in done.err
    assert hub.requests == []


@pytest.mark.usefixtures("exported")
def test_without_a_token_nothing_is_asked(
    tmp_path: Path, hub: HubServer, push: PushTo, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    done = push("somebody/small-model")
    assert done.code == 1
    assert "log in with `hf auth login`, or set HF_TOKEN" in done.err
    assert hub.requests == []


@pytest.mark.usefixtures("exported")
def test_name_without_an_owner_is_refused(hub: HubServer, push: PushTo):
    done = push("small-model")
    assert done.code == 1
    assert "give owner/name" in done.err
    assert hub.requests == []


def test_without_an_export_the_command_to_make_it_is_named(hub: HubServer, push: PushTo):
    done = push("somebody/small-model")
    assert done.code == 1
    assert "has no exported_model yet: run `make demo RECIPE=tiny TARGET=light`" in done.err
    assert hub.requests == []


def test_token_cannot_be_given_on_the_command_line(push: PushTo):
    done = push("somebody/small-model", "--token", "hf_other")
    assert done.code == 2
    assert "unrecognized arguments: --token" in done.err
