"""The classes of exported directories, registered in transformers."""

from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.model.exported_code.configuration_decilm import DeciLMConfig
from pipeline.model.exported_code.modeling_decilm import DeciLMForCausalLM


def register() -> None:
    """Let AutoConfig, AutoModelForCausalLM and AutoTokenizer load exported directories without running their code."""
    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM, exist_ok=True)
