"""Writing a checkpoint as one DeciLM (nemotron-nas) directory that transformers and vLLM load as it is.

config.json, generation_config.json                 the v1 schema, written here and never by save_pretrained
model*.safetensors                                  Hugging Face Llama names, dtype kept
configuration_decilm.py, modeling_decilm.py         for readers that do not have this project
tokenizer.json, tokenizer_config.json, chat_template.jinja
refit.json                                          what the search knows: parent layers and true widths
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from pipeline.architecture import Architecture, swiglu
from pipeline.model import exported_code
from pipeline.model.checkpoint import TensorReader, copy_tokenizer, read_architecture, write_tensors
from pipeline.model.decilm_config import decilm_config, padded_width

CODE_FILES = ("configuration_decilm.py", "modeling_decilm.py")


def export_decilm(checkpoint_dir: Path, *, out_dir: Path) -> Architecture:
    """Write the export and return the architecture it describes: the checkpoint's, FFNs padded to multiples of 256.

    Padding adds channels whose gate, up and down weights are zero, so the outputs stay what they were.
    """
    architecture = read_architecture(checkpoint_dir)
    exported = padded_architecture(architecture)
    reader = TensorReader(checkpoint_dir)
    torch_dtype = str(reader.dtype("model.embed_tokens.weight")).removeprefix("torch.")
    out_dir.mkdir(parents=True, exist_ok=True)
    write_tensors(out_dir, _padded_tensors(reader, exported))
    _write_json(out_dir / "config.json", decilm_config(exported, torch_dtype=torch_dtype))
    _write_json(out_dir / "generation_config.json", _generation_config(exported))
    _write_json(out_dir / "refit.json", _search_facts(architecture))
    copy_tokenizer(checkpoint_dir, out_dir)
    for name in CODE_FILES:
        shutil.copyfile(Path(exported_code.__path__[0]) / name, out_dir / name)
    return exported


def padded_architecture(architecture: Architecture) -> Architecture:
    """Return the architecture with every FFN width raised to a multiple of 256."""
    blocks = []
    for block in architecture.blocks:
        width = block.ffn.intermediate_size
        ffn = block.ffn if width is None else swiglu(padded_width(width))
        blocks.append(block.model_copy(update={"ffn": ffn}))
    return architecture.with_blocks(blocks)


def _padded_tensors(reader: TensorReader, exported: Architecture) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in reader:
        prefix, _, relative = name.partition(".mlp.")
        projection, _, part = relative.partition(".")
        if projection in ("gate_proj", "up_proj", "down_proj") and (projection, part) != ("down_proj", "bias"):
            width = exported.blocks[int(prefix.rpartition(".")[2])].ffn.intermediate_size
            assert width is not None
            channel_axis = 1 if projection == "down_proj" else 0
            yield name, _zero_padded(tensor, axis=channel_axis, size=width)
        else:
            yield name, tensor


def _zero_padded(tensor: Tensor, *, axis: int, size: int) -> Tensor:
    padding = [0, 0] * (tensor.dim() - 1 - axis) + [0, size - tensor.shape[axis]]
    return nn.functional.pad(tensor, padding)


def _generation_config(architecture: Architecture) -> dict[str, object]:
    return {
        "bos_token_id": architecture.bos_token_id,
        "eos_token_id": list(architecture.eos_token_ids) or None,
        "pad_token_id": architecture.pad_token_id,
    }


def _search_facts(architecture: Architecture) -> dict[str, object]:
    return {
        "format": "refit 1",
        "blocks": [
            {
                "parent_layers": list(block.parent_layers),
                "attention": block.attention.key,
                "ffn": block.ffn.key,
                "intermediate_size": block.ffn.intermediate_size,
                "num_key_value_heads": block.attention.num_key_value_heads,
            }
            for block in architecture.blocks
        ],
    }


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
