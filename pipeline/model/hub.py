"""The Hugging Face hub: fetching a parent (safe files only, at one commit), and pushing a finished model.

The token is the one that huggingface_hub finds itself, in HF_TOKEN or from `hf auth login`. It is never an argument
here, and never part of a message.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from pipeline.errors import CheckpointError, HubError
from pipeline.model.shards import SUBBLOCKS_DIR
from pipeline.recipe import HubParent

_SAFE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    f"{SUBBLOCKS_DIR}/*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def download_from_hub(parent: HubParent, *, downloads: Path) -> Path:
    """Return the directory of a hub checkpoint, downloaded unless `downloads` has it already.

    Raises:
        CheckpointError: when the hub cannot be reached or refuses.
    """
    try:
        directory = snapshot_download(
            repo_id=parent.repo_id,
            revision=parent.revision,
            allow_patterns=list(_SAFE_FILES),
            cache_dir=downloads / "huggingface",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as err:
        raise CheckpointError(
            f"{parent.repo_id} at {parent.revision[:12]} cannot be fetched from the Hugging Face hub "
            f"({type(err).__name__}: {str(err).splitlines()[0] if str(err) else 'no message'}): check the name and the "
            "network, log in with `hf auth login` for a gated model, or give a local directory as the parent"
        ) from err
    return Path(directory)


def push_to_hub(files: Mapping[str, Path], *, repo_id: str, public: bool, message: str) -> str:
    """Push files in one commit to a model repository, made where it is missing, and return the commit's address.

    Args:
        files: what to push, by its path in the repository; a file that is there already is replaced.
        repo_id: owner/name.
        public: whether the repository is one that everybody can read. One that exists keeps its own visibility, and
            nothing is pushed to it when that is another.
        message: of the commit.

    Raises:
        HubError: without a token, for a repository of the other visibility, or when the hub refuses.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", repo_id):
        raise HubError(f"the repository is {repo_id!r}; give owner/name")
    token = get_token()
    if token is None:
        raise HubError("no token of the Hugging Face hub is known: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        is_private = bool(api.model_info(repo_id).private)
        if is_private is not public:
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
            return api.create_commit(repo_id, operations, commit_message=message).commit_url
    except Exception as err:  # noqa: BLE001 (the hub's, its HTTP client's, the disk's: any may quote the request)
        first_line = next((line for line in str(err).splitlines() if line.strip()), "no message")
        problem = f"{type(err).__name__}: {first_line}".replace(token, "<token>")
        # Not `from err`: a traceback that shows the cause would show its text.
        raise HubError(
            f"{repo_id} cannot be pushed to the Hugging Face hub ({problem}): check the name, the network, and that "
            "your token may write there"
        ) from None
    raise HubError(
        f"{repo_id} is there already and {'private' if is_private else 'public'}, nothing was pushed: "
        + ("leave out --public" if is_private else "say --public if everybody may have this model")
        + ", or give another name"
    )
