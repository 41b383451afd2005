"""Architectures known from configuration alone: shipped files, a config.json, a recipe's parent. Imports no torch.

A config.json says itself which of three formats it is: a plain Llama's, DeciLM (nemotron-nas) v1, or AnyModel.
"""

from pathlib import Path
from typing import Any

from pipeline.architecture import Architecture, BlockSpec, gqa, swiglu
from pipeline.errors import CheckpointError, RecipeError
from pipeline.model.anymodel_config import anymodel_architecture, is_anymodel
from pipeline.model.decilm_config import MODEL_TYPE, decilm_architecture
from pipeline.model.hf_config import llama_architecture, read_json_object
from pipeline.recipe import HubParent, LocalParent, ParentConfig, RandomParent, WheelParent

ARCHITECTURES_DIR = Path(__file__).parents[1] / "architectures"
# Three special tokens and one per byte, filled up to a multiple of 64.
RANDOM_VOCAB_SIZE = 320


def load_architecture(name_or_path: str) -> Architecture:
    """Read a shipped architecture (`llama-3.1-8b-instruct`), a config.json, or the one in a directory.

    Raises:
        RecipeError: when there is no such file, listing the shipped names.
        CheckpointError: when it describes something else than a Llama, DeciLM v1 or AnyModel.
    """
    shipped = ARCHITECTURES_DIR / f"{name_or_path}.json"
    path = shipped if Path(name_or_path).name == name_or_path and shipped.is_file() else Path(name_or_path).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise RecipeError(
            f"no architecture {name_or_path!r}: give the path of a config.json, or one of "
            f"{', '.join(sorted(file.stem for file in ARCHITECTURES_DIR.glob('*.json')))}"
        )
    return _architecture(read_json_object(path), token_ids={}, path=path)


def directory_architecture(directory: Path) -> Architecture:
    """Return what a Hugging Face checkpoint is, from its config.json and the token ids of generation_config.json.

    Raises:
        CheckpointError: for anything but a plain Llama, DeciLM v1 or AnyModel: another family, quantisation, another
            activation or rotary rule, windows, experts, or a key that is not known.
    """
    generation = directory / "generation_config.json"
    token_ids = read_json_object(generation) if generation.is_file() else {}
    path = directory / "config.json"
    return _architecture(read_json_object(path), token_ids=token_ids, path=path)


def _architecture(config: dict[str, Any], *, token_ids: dict[str, Any], path: Path) -> Architecture:
    if config.get("model_type") == MODEL_TYPE:
        return decilm_architecture(config, token_ids=token_ids, path=path)
    if is_anymodel(config):
        return anymodel_architecture(config, token_ids=token_ids, path=path)
    return llama_architecture(config, token_ids=token_ids, path=path)


def parent_architecture(parent: ParentConfig) -> Architecture:
    """Return what a recipe's parent is, from its configuration; of a hub or wheel parent, what it must turn out to be.

    Raises:
        RecipeError: when the parent names no architecture that can be found, or its own figures do not fit.
        CheckpointError: when a config.json cannot be read, or the layers are not all the same attention and FFN.
    """
    match parent:
        case RandomParent():
            architecture = random_architecture(parent)
        case LocalParent():
            architecture = directory_architecture(Path(parent.path).expanduser())
        case WheelParent() | HubParent():
            architecture = load_architecture(parent.architecture)
    architecture.homogeneous_block()
    return architecture


def random_architecture(config: RandomParent) -> Architecture:
    """Return the Llama that a random parent is.

    Raises:
        RecipeError: when the head counts do not divide.
    """
    if config.hidden_size % (2 * config.num_attention_heads) or config.num_attention_heads % config.num_key_value_heads:
        raise RecipeError(
            f"parent: hidden_size {config.hidden_size}, num_attention_heads {config.num_attention_heads} and "
            f"num_key_value_heads {config.num_key_value_heads} do not fit: hidden_size must be a multiple of twice the "
            "attention heads, and those a multiple of the key/value heads"
        )
    block = {"attention": gqa(config.num_key_value_heads), "ffn": swiglu(config.intermediate_size)}
    return Architecture(
        vocab_size=RANDOM_VOCAB_SIZE,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
        blocks=tuple(BlockSpec(**block, parent_layers=(layer,)) for layer in range(config.num_hidden_layers)),
    )


def require_same_shape(imported: Architecture, *, named: str) -> None:
    """Refuse a checkpoint that is not the architecture its recipe names; token ids and context may differ.

    Raises:
        CheckpointError: naming the first size that differs.
    """
    expected = load_architecture(named)
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "attention_bias",
        "mlp_bias",
    ):
        got, wanted = getattr(imported, name), getattr(expected, name)
        if got != wanted:
            raise CheckpointError(
                f"the parent's {name} is {got}, the recipe names architecture {named!r}, whose {name} is {wanted}: "
                "correct parent.architecture, or the checkpoint"
            )
    for layer, (block, other) in enumerate(zip(imported.blocks, expected.blocks, strict=True)):
        if block.key != other.key:
            raise CheckpointError(
                f"the parent's layer {layer} is {block.key}, the recipe names architecture {named!r}, whose layer "
                f"{layer} is {other.key}: correct parent.architecture, or the checkpoint"
            )
