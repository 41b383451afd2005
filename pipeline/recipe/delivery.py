"""In which formats the final checkpoint leaves."""

from typing import Literal

from pydantic import Field

from pipeline.architecture import Frozen

GGUFPrecision = Literal["fp32", "bf16", "fp16"]


class ExportConfig(Frozen):
    """What exported_model writes beside the DeciLM directory.

    Each takes about as much disk as the directory itself. A GGUF file at another precision than the checkpoint's is no
    longer the same model.
    """

    gguf: GGUFPrecision | None = Field(
        description="precision of the matrices in model.gguf, for llama.cpp; null: no such file"
    )
    plain_llama: bool = Field(
        description="also write llama/, where the child's layers are all alike: the same weights as a stock Llama, for "
        "runtimes that do not know DeciLM"
    )
