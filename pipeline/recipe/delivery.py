"""In which formats the final checkpoint leaves."""

from typing import Literal

from pipeline.architecture import Frozen

GGUFPrecision = Literal["fp32", "bf16", "fp16"]


class ExportConfig(Frozen):
    """What exported_model writes beside the DeciLM directory.

    `gguf` is the precision of the matrices in model.gguf, for llama.cpp; null for no such file. It takes as much disk
    as the directory itself, and at another precision than the checkpoint's it is no longer the same model.
    `plain_llama` asks for a second directory, llama/, where the child's layers are all alike: the same weights as a
    stock Llama, for runtimes that do not know DeciLM. It takes as much disk as the directory itself.
    """

    gguf: GGUFPrecision | None
    plain_llama: bool
