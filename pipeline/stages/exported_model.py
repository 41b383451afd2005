"""exported_model: the final checkpoint as one DeciLM (nemotron-nas) directory, loaded back and compared.

    python -m pipeline materialize exported_model

Leaves out: GGUF, and re-packing of identity layers.

Letters: B batch, T tokens, V vocab_size.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import costs
from pipeline.architecture import Architecture
from pipeline.data.chat import generation_prompt_ids, reasoning_messages, render_chat
from pipeline.model.checkpoint import TensorReader, load_model, load_tokenizer, read_architecture
from pipeline.model.decilm import register
from pipeline.model.export_decilm import export_decilm
from pipeline.model.portability import runtime_support
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import NoOptions
from pipeline.training.distributed import use_threads

_COMPARED_BATCH, _COMPARED_TOKENS = 2, 64
_QUESTION = "What is 17 + 25?\n\n1. Think.  2. Answer."


def run(config: NoOptions, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Export rl_checkpoint and prove that transformers loads the same model and tokenizer from it."""
    use_threads(inputs.execution.num_threads)
    checkpoint_dir = inputs["rl_checkpoint"]
    architecture = read_architecture(checkpoint_dir)
    exported = export_decilm(checkpoint_dir, out_dir=out_dir)
    reader = TensorReader(out_dir)
    register()
    ids_BT = _fixed_ids(architecture)
    expected_BTV = _logits(load_model(checkpoint_dir, dtype=torch.float32), ids_BT)
    model = AutoModelForCausalLM.from_pretrained(out_dir, dtype=torch.float32, local_files_only=True).eval()
    difference_BTV = (_logits(model, ids_BT) - expected_BTV).abs()
    support = runtime_support(exported)
    return StageResult(
        metrics={
            "max_abs_logit_difference": float(difference_BTV.max()),
            "num_token_id_differences": _num_token_id_differences(checkpoint_dir, out_dir),
            "num_parameters": costs.num_parameters(exported),
            "num_padding_parameters": costs.num_parameters(exported) - costs.num_parameters(architecture),
            "size_mib": sum(path.stat().st_size for path in out_dir.glob("*.safetensors")) / costs.MIB,
        },
        facts={
            "format": "DeciLM (nemotron-nas) v1",
            "dtype": str(reader.dtype("model.embed_tokens.weight")).removeprefix("torch."),
            "runs_as_is": ", ".join(item.runtime for item in support if item.runs_as_is),
        },
        tables={
            "portability": Table.of(
                ("runtime", "runs_as_is", "why"), [(item.runtime, item.runs_as_is, item.reason) for item in support]
            )
        },
    )


def _fixed_ids(architecture: Architecture) -> Tensor:
    num_tokens = min(_COMPARED_TOKENS, architecture.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(architecture.vocab_size, (_COMPARED_BATCH, num_tokens), generator=generator)


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
