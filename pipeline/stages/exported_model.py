"""exported_model: the final checkpoint as one DeciLM (nemotron-nas) directory, loaded back and compared; GGUF, Llama.

    python -m pipeline materialize exported_model

Letters: B batch, T tokens, V vocab_size.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from pipeline import costs
from pipeline.architecture import Architecture
from pipeline.data.chat import generation_prompt_ids, reasoning_messages, render_chat
from pipeline.model.checkpoint import TensorReader, load_model, load_tokenizer, read_architecture
from pipeline.model.decilm import register
from pipeline.model.export_decilm import export_decilm
from pipeline.model.export_gguf import export_gguf
from pipeline.model.export_llama import export_llama, llama_obstacle
from pipeline.model.gguf_tokenizer import tokenizer_obstacle
from pipeline.model.portability import runtime_support
from pipeline.runtimes import GGUF_FILE
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import ExportStage
from pipeline.training.distributed import use_threads

LLAMA_DIR = "llama"
_COMPARED_BATCH, _COMPARED_TOKENS = 2, 64
_QUESTION = "What is 17 + 25?\n\n1. Think.  2. Answer."


def run(config: ExportStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Export rl_checkpoint."""
    use_threads(inputs.execution.num_threads)
    return export_and_compare(inputs["rl_checkpoint"], out_dir=out_dir, config=config)


def export_and_compare(checkpoint_dir: Path, *, out_dir: Path, config: ExportStage) -> StageResult:
    """Export a checkpoint and prove that transformers loads the same model and tokenizer from it.

    A child with layers that llama.cpp does not have gets no GGUF file though the recipe asks for one: the search
    decides the layers, and the portability table says what keeps them out. In the same way, only a child whose layers
    are all alike gets the directory of a plain Llama.
    """
    architecture = read_architecture(checkpoint_dir)
    repacking = export_decilm(checkpoint_dir, out_dir=out_dir)
    exported = repacking.architecture
    reader = TensorReader(out_dir)
    register()
    ids_BT = _fixed_ids(architecture)
    expected_BTV = _logits(load_model(checkpoint_dir, dtype=torch.float32), ids_BT)
    difference = _largest_difference(AutoModelForCausalLM, out_dir, ids_BT, expected_BTV)
    obstacle = llama_obstacle(architecture)
    if config.export.plain_llama and obstacle is None:
        export_llama(checkpoint_dir, out_dir=out_dir / LLAMA_DIR)
        as_llama = _largest_difference(LlamaForCausalLM, out_dir / LLAMA_DIR, ids_BT, expected_BTV)
        difference = torch.tensor([difference, as_llama]).max().item()  # max() of Python would lose a NaN
    support = runtime_support(architecture, tokenizer_obstacle=tokenizer_obstacle(checkpoint_dir))
    refused = {item.runtime: item.reason for item in support if item.runs == "cannot"}
    if config.export.gguf is not None and "llama.cpp" not in refused:
        export_gguf(checkpoint_dir, out_dir / GGUF_FILE, precision=config.export.gguf)
    return StageResult(
        metrics={
            "max_abs_logit_difference": difference,
            "num_token_id_differences": _num_token_id_differences(checkpoint_dir, out_dir),
            "num_parameters": costs.num_parameters(exported),
            "num_padding_parameters": costs.num_parameters(exported) - costs.num_parameters(architecture),
            "num_hidden_layers": exported.num_hidden_layers,
            "num_layers_dropped": architecture.num_hidden_layers - exported.num_hidden_layers,
            "num_runtimes_that_cannot": len(refused),
            "size_mib": _size_mib(out_dir, "*.safetensors"),
            "gguf_size_mib": _size_mib(out_dir, GGUF_FILE),
            "llama_size_mib": _size_mib(out_dir / LLAMA_DIR, "*.safetensors"),
        },
        facts={
            "format": "DeciLM (nemotron-nas) v1",
            "dtype": str(reader.dtype("model.embed_tokens.weight")).removeprefix("torch."),
            "first_attention": "its own" if repacking.sources[0].attention is not None else "added, its weights zero",
            "gguf": _gguf_fact(config, refused),
            "plain_llama": _llama_fact(config, obstacle),
        },
        tables={
            "portability": Table.of(
                ("runtime", "runs", "how, or why not"), [(item.runtime, item.runs, item.reason) for item in support]
            )
        },
    )


def _gguf_fact(config: ExportStage, refused: dict[str, str]) -> str:
    if config.export.gguf is None:
        return "not asked for"
    reason = refused.get("llama.cpp")
    return f"{GGUF_FILE}, {config.export.gguf}" if reason is None else f"not written: {reason}"


def _llama_fact(config: ExportStage, obstacle: str | None) -> str:
    if not config.export.plain_llama:
        return "not asked for"
    return f"{LLAMA_DIR}/" if obstacle is None else f"not written: {obstacle}"


def _size_mib(directory: Path, pattern: str) -> float:
    return sum(path.stat().st_size for path in directory.glob(pattern)) / costs.MIB


def _fixed_ids(architecture: Architecture) -> Tensor:
    num_tokens = min(_COMPARED_TOKENS, architecture.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(architecture.vocab_size, (_COMPARED_BATCH, num_tokens), generator=generator)


def _largest_difference(
    kind: type[PreTrainedModel] | type[AutoModelForCausalLM], directory: Path, ids_BT: Tensor, expected_BTV: Tensor
) -> float:
    """Load an exported directory as a user does and return how far its logits are from the checkpoint's, fp32."""
    model = kind.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    return float((_logits(model, ids_BT) - expected_BTV).abs().max())


@torch.no_grad()
def _logits(model: torch.nn.Module, ids_BT: Tensor) -> Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits


def _num_token_id_differences(checkpoint_dir: Path, export_dir: Path) -> int:
    """Count positions at which a chat in either mode, or its prompt, has other token ids after the export."""
    before = load_tokenizer(checkpoint_dir)
    after = AutoTokenizer.from_pretrained(export_dir, local_files_only=True)
    differences = 0
    for thinking in (True, False):
        messages = reasoning_messages(_QUESTION, thinking=thinking)
        answered = [*messages, {"role": "assistant", "content": "42"}]
        for ids, other in (
            (generation_prompt_ids(before, messages), generation_prompt_ids(after, messages)),
            (render_chat(before, answered), render_chat(after, answered)),
        ):
            differences += sum(a != b for a, b in zip(ids, other, strict=False)) + abs(len(ids) - len(other))
    return differences
