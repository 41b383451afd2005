"""Number ranges and names that the models of a recipe share."""

from typing import Annotated, Literal

from pydantic import Field

Positive = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Precision = Literal["fp32", "bf16"]
ServedPrecision = Literal["fp32", "bf16", "fp8"]
Backend = Literal["torch", "llama_cpp", "vllm"]  # what times models on the machine at hand

# What an answer can be asked for in a way that a program can check (pipeline.data.instructions).
InstructionKind = Literal[
    "num_words",
    "num_sentences",
    "num_paragraphs",
    "include_keywords",
    "keyword_frequency",
    "exclude_keywords",
    "letter_frequency",
    "all_lowercase",
    "all_uppercase",
    "no_commas",
    "starts_with",
    "ends_with",
    "num_bullets",
    "json_only",
    "quoted",
    "title",
    "num_sections",
    "postscript",
]
