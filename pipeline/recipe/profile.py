"""Scenarios in which a model serves, and how blocks are timed in them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.devices import DEVICES, THIS_MACHINE
from pipeline.recipe.types import (
    Backend,
    Name,
    Positive,
    Precision,
    ServedPrecision,
)


class Scenario(Frozen):
    """One way the model is used: a batch of prompts, each answered with generation_tokens.

    A decode step is timed half-way through the generation: it costs what the steps cost on average. A list as
    `batch_size` in a recipe stands for one scenario each, which `sweep` names after the one that was written.
    """

    name: Name = Field(description="by which limits refer to it")
    batch_size: Positive = Field(description="sequences at once; in a recipe also a list of two and more")
    prompt_tokens: Positive = Field(description="tokens of each prompt")
    generation_tokens: Positive = Field(description="tokens of each reply")
    sweep: Name | None = Field(
        default=None, description="what a list of batch sizes was named; filled in when the recipe is read"
    )

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens of the whole batch."""
        return self.batch_size * (self.prompt_tokens + self.generation_tokens)


class ProfileConfig(Frozen):
    """What blocks cost in time.

    `torch`, `llama_cpp` and `vllm` measure where the stage runs; `roofline` computes for a named device, or for this
    machine from the three rates that it measures. Whole models are always measured, in the backend itself or, beside a
    roofline, in torch.
    """

    backend: Literal["torch", "llama_cpp", "vllm", "roofline"] = Field(
        description="where block times come from: measured in torch, llama.cpp or vLLM, or computed by a roofline"
    )
    device: Name | None = Field(
        default=None,
        description=f"whose data sheet a roofline computes with, or {THIS_MACHINE}; null for the others",
    )
    tensor_parallel_size: Positive | None = Field(
        default=None, description="devices that hold the model together, for a roofline; null: one"
    )
    scenarios: Annotated[tuple[Scenario, ...], Field(min_length=1)]
    precision: Precision = Field(description="in which models are timed")
    served_precision: ServedPrecision = Field(
        description="in which the child will be deployed: weights and cached values are counted, and a roofline "
        "computes, in it"
    )
    num_threads: Positive = Field(description="CPU threads of every timing, whatever the execution settings say")
    warmups: Positive = Field(description="rounds in front of those that count, thrown away")
    repeats: Positive = Field(description="rounds that count; each time's median is kept")

    @model_validator(mode="before")
    @classmethod
    def _write_out_batch_sizes(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("scenarios"), list):
            return data
        written: list[Any] = []
        for scenario in data["scenarios"]:
            sizes = scenario.get("batch_size") if isinstance(scenario, dict) else None
            if not isinstance(sizes, list):
                written.append(scenario)
                continue
            if len(set(map(str, sizes))) < len(sizes) or len(sizes) < 2:
                raise ValueError(
                    f"block_profile.scenarios: {scenario.get('name')} has batch_size {sizes}: give one number, or two "
                    "and more different ones"
                )
            name = scenario.get("name")
            written += [{**scenario, "name": f"{name}-batch-{one}", "batch_size": one, "sweep": name} for one in sizes]
        return {**data, "scenarios": written}

    @model_validator(mode="after")
    def _scenarios_have_names_of_their_own(self) -> Self:
        names = [*(scenario.name for scenario in self.scenarios), *self.sweeps]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"block_profile.scenarios has {twice[0]!r} twice: name each scenario differently")
        return self

    @property
    def sweeps(self) -> dict[str, tuple[Scenario, ...]]:
        """The scenarios that were written with several batch sizes, by name, one scenario per size."""
        names = dict.fromkeys(scenario.sweep for scenario in self.scenarios if scenario.sweep is not None)
        return {name: tuple(one for one in self.scenarios if one.sweep == name) for name in names}

    @property
    def is_of_this_machine(self) -> bool:
        """Whether the times are of the machine that the stage runs on."""
        return self.backend != "roofline" or self.device == THIS_MACHINE

    @property
    def num_devices(self) -> int:
        """How many devices hold the model together."""
        return self.tensor_parallel_size or 1

    def scenario(self, name: str) -> Scenario:
        """Return a scenario by name."""
        return next(scenario for scenario in self.scenarios if scenario.name == name)

    @property
    def measured_in(self) -> Backend:
        """What times whole models: a roofline times nothing, and torch is there wherever a stage runs."""
        return "torch" if self.backend == "roofline" else self.backend

    @model_validator(mode="after")
    def _device_belongs_to_roofline(self) -> Self:
        if self.backend != "roofline":
            for name, value in (("device", self.device), ("tensor_parallel_size", self.tensor_parallel_size)):
                if value is not None:
                    raise ValueError(
                        f"block_profile.{name} is {value!r} with backend {self.backend!r}, which measures the "
                        "machine it runs on: take it out, or set backend: roofline"
                    )
            batched = [scenario.name for scenario in self.scenarios if scenario.batch_size > 1]
            if self.backend == "llama_cpp" and batched:
                raise ValueError(
                    f"block_profile.scenarios: {batched[0]} has a batch_size above 1, and llama-bench times one "
                    "sequence; set it to 1, or backend: torch"
                )
            return self
        if self.device == THIS_MACHINE:
            if self.num_devices > 1 or self.served_precision != self.precision:
                raise ValueError(
                    f"block_profile.device {THIS_MACHINE} is measured alone, and in the precision of all timings, got "
                    f"tensor_parallel_size {self.num_devices} and served_precision {self.served_precision} "
                    f"beside precision {self.precision}: change these, or name one of {', '.join(DEVICES)}"
                )
            return self
        if self.device not in DEVICES:
            raise ValueError(
                f"block_profile.device is {self.device!r}; backend 'roofline' needs {THIS_MACHINE} or one of "
                f"{', '.join(DEVICES)}"
            )
        if self.served_precision == "fp8" and not DEVICES[self.device].computes_fp8:
            able = ", ".join(name for name, device in DEVICES.items() if device.computes_fp8)
            raise ValueError(
                f"block_profile.device {self.device} does not compute in the served_precision fp8; choose {able}, or "
                "served_precision: bf16"
            )
        return self
