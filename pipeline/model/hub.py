"""Fetching a parent from the Hugging Face hub: safe files only, at one commit. hf_import reads what comes."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from pipeline.errors import CheckpointError
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
        CheckpointError: when the revision is not a commit, or the hub cannot be reached or refuses.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", parent.revision):
        raise CheckpointError(
            f"parent.revision is {parent.revision!r}; give the 40 hex digits of a commit, since a branch changes"
        )
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
