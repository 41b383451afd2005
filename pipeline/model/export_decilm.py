"""Writing a checkpoint as one DeciLM (nemotron-nas) directory that transformers, vLLM and mlx-lm load as it is.

config.json, generation_config.json                 the v1 schema, written here and never by save_pretrained
model*.safetensors                                  Hugging Face Llama names, dtype kept
configuration_decilm.py, modeling_decilm.py         for readers that do not have this project
tokenizer.json, tokenizer_config.json, chat_template.jinja
refit.json                                          what the search knows: parent layers and true widths

Layers are re-packed and FFNs padded (pipeline.model.repacking), so that what no runtime tolerates is not there.
"""

import json
import shutil
from pathlib import Path

from pipeline.architecture import Architecture
from pipeline.model import exported_code
from pipeline.model.checkpoint import TensorReader, copy_tokenizer, read_architecture, write_tensors
from pipeline.model.decilm_config import decilm_config
from pipeline.model.repacking import RepackedTensors, Repacking, portable

CODE_FILES = ("configuration_decilm.py", "modeling_decilm.py")


def export_decilm(checkpoint_dir: Path, *, out_dir: Path) -> Repacking:
    """Write the export and return the architecture it describes, with where its layers came from."""
    architecture = read_architecture(checkpoint_dir)
    repacking = portable(architecture)
    tensors = RepackedTensors(TensorReader(checkpoint_dir), repacking)
    torch_dtype = str(tensors.dtype).removeprefix("torch.")
    out_dir.mkdir(parents=True, exist_ok=True)
    write_tensors(out_dir, ((name, tensors.read(name)) for name in tensors.names))
    write_json(out_dir / "config.json", decilm_config(repacking.architecture, torch_dtype=torch_dtype))
    write_json(out_dir / "generation_config.json", generation_config(architecture))
    write_json(out_dir / "refit.json", _search_facts(architecture, repacking))
    copy_tokenizer(checkpoint_dir, out_dir)
    for name in CODE_FILES:
        shutil.copyfile(Path(exported_code.__path__[0]) / name, out_dir / name)
    return repacking


def generation_config(architecture: Architecture) -> dict[str, object]:
    """Return the generation_config.json of a model: its special tokens."""
    return {
        "bos_token_id": architecture.bos_token_id,
        "eos_token_id": list(architecture.eos_token_ids) or None,
        "pad_token_id": architecture.pad_token_id,
    }


def _search_facts(architecture: Architecture, repacking: Repacking) -> dict[str, object]:
    """Return the checkpoint's own subblocks for each exported layer; a made-up attention has no source."""
    blocks = []
    for block, sources in zip(repacking.architecture.blocks, repacking.sources, strict=True):
        attention = None if sources.attention is None else architecture.blocks[sources.attention].attention
        ffn = None if sources.ffn is None else architecture.blocks[sources.ffn].ffn
        blocks.append(
            {
                "parent_layers": list(block.parent_layers),
                "attention": "no_op" if attention is None else attention.key,
                "ffn": "no_op" if ffn is None else ffn.key,
                "intermediate_size": None if ffn is None else ffn.intermediate_size,
                "num_key_value_heads": None if attention is None else attention.num_key_value_heads,
            }
        )
    return {"format": "refit 2", "num_layers_before_repacking": architecture.num_hidden_layers, "blocks": blocks}


def write_json(path: Path, value: dict[str, object]) -> None:
    """Write one JSON file of an exported directory."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
