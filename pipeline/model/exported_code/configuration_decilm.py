"""Configuration of a heterogeneous Llama in the DeciLM (nemotron-nas) format, for transformers and for vLLM.

Servers read `config.block_configs[layer].attention.n_heads_in_group`, `config.block_configs[layer].ffn.ffn_mult` and
their siblings as attributes, which is why blocks are objects and not dictionaries.
"""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig


@dataclass
class AttentionBlock:
    """The attention of one layer; `n_heads_in_group` is the number of query heads per key/value head."""

    n_heads_in_group: int | None = None
    no_op: bool = False
    num_sink_tokens: int | None = None
    replace_with_linear: bool = False
    sparsify: list | None = None
    unshifted_sink: bool = False
    use_prefill_window_in_sink_attention: bool = False
    window_length: int | None = None


@dataclass
class FFNBlock:
    """The FFN of one layer; its width follows from `ffn_mult`, see `ffn_width`."""

    ffn_mult: float | None = None
    no_op: bool = False
    replace_with_linear: bool = False
    sparsify: list | None = None


@dataclass
class Block:
    """One layer."""

    attention: AttentionBlock
    ffn: FFNBlock


def ffn_width(ffn_mult: float, *, hidden_size: int) -> int:
    """Return 2/3 ffn_mult hidden_size, rounded up to a multiple of 256."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return width + -width % 256


class DeciLMConfig(PretrainedConfig):
    """A Llama configuration whose key/value heads and FFN widths stand per layer in `block_configs`."""

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers declares it a plain list)

    def __init__(
        self,
        *,
        block_configs: list[dict[str, Any] | Block] | None = None,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        num_attention_heads: int = 32,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        hidden_act: str = "silu",
        attention_bias: bool = False,
        mlp_bias: bool = False,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.block_configs = None if block_configs is None else [_block(item) for item in block_configs]
        kwargs["num_hidden_layers"] = len(block_configs or [])
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.hidden_act = hidden_act
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        # Per layer, in block_configs; readers expect the two keys to be there and to be empty.
        kwargs["intermediate_size"] = kwargs["num_key_value_heads"] = None
        rope = {"rope_type": "default", "rope_theta": rope_theta, **(rope_parameters or rope_scaling or {})}
        self.rope_parameters = rope
        super().__init__(**kwargs)
        self.rope_theta = rope["rope_theta"]
        if not hasattr(type(self), "rope_scaling"):  # transformers 5 derives it from rope_parameters
            scaled = rope["rope_type"] != "default"
            self.rope_scaling = {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, blocks as dictionaries."""
        plain = super().to_dict()
        if self.block_configs is not None:
            plain["block_configs"] = [asdict(block) for block in self.block_configs]
        return plain


def _block(item: dict[str, Any] | Block) -> Block:
    if isinstance(item, Block):
        return item
    return Block(attention=AttentionBlock(**item["attention"]), ffn=FFNBlock(**item["ffn"]))
