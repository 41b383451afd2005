"""Writing a checkpoint whose layers are all alike as a plain Llama, which everything that knows Llama loads as it is.

config.json, generation_config.json, model*.safetensors     as transformers' LlamaForCausalLM has them, dtype kept
tokenizer.json, tokenizer_config.json, chat_template.jinja

Layers are re-packed first, so that a child without some whole layers is a shorter Llama. Nothing is padded or added: no
width that a Llama has is refused by its readers.
"""

from pathlib import Path

from pipeline.architecture import Architecture
from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import TensorReader, copy_tokenizer, read_architecture, write_tensors
from pipeline.model.export_decilm import generation_config, write_json
from pipeline.model.hf_config import llama_config
from pipeline.model.repacking import RepackedTensors, repack


def llama_obstacle(architecture: Architecture) -> str | None:
    """Return why the architecture is no plain Llama once its layers are re-packed, or None when it is one."""
    blocks = repack(architecture).architecture.blocks
    for layer, block in enumerate(blocks):
        if (block.attention.kind, block.ffn.kind) != ("gqa", "swiglu"):
            return f"re-packed layer {layer} is {block.key}"
        if (block.attention, block.ffn) != (blocks[0].attention, blocks[0].ffn):
            return f"re-packed layer {layer} is {block.key} while layer 0 is {blocks[0].key}"
    return None


def export_llama(checkpoint_dir: Path, *, out_dir: Path) -> Architecture:
    """Write the export and return the architecture it describes.

    Raises:
        CheckpointError: when the checkpoint is no plain Llama.
    """
    architecture = read_architecture(checkpoint_dir)
    obstacle = llama_obstacle(architecture)
    if obstacle is not None:
        raise CheckpointError(f"{checkpoint_dir} is no plain Llama: {obstacle}; export it as DeciLM")
    repacking = repack(architecture)
    tensors = RepackedTensors(TensorReader(checkpoint_dir), repacking)
    torch_dtype = str(tensors.dtype).removeprefix("torch.")
    out_dir.mkdir(parents=True, exist_ok=True)
    write_tensors(out_dir, ((name, tensors.read(name)) for name in tensors.names))
    write_json(out_dir / "config.json", llama_config(repacking.architecture, torch_dtype=torch_dtype))
    write_json(out_dir / "generation_config.json", generation_config(architecture))
    copy_tokenizer(checkpoint_dir, out_dir)
    return repacking.architecture
