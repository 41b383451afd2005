"""Scenarios in which a model serves, and how blocks are timed in them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.architecture import Frozen
from pipeline.devices import DEVICES
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

    name: Name
    batch_size: Positive
    prompt_tokens: Positive
    generation_tokens: Positive
    sweep: Name | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens of the whole batch."""
        return self.batch_size * (self.prompt_tokens + self.generation_tokens)


class ProfileConfig(Frozen):
    """What blocks cost in time, by `backend`.

    `torch`, `llama_cpp` and `vllm` measure where the stage runs; `roofline` computes for a named device.

    Times are measured in `precision`, the median over `repeats` kept and `warmups` runs thrown away; whole models are
    always measured so, in the backend itself or, beside a roofline, in torch. Weights and cached values are counted,
    and a roofline computes, in `served_precision`, the one the child will be deployed in. A roofline may split the
    model over `tensor_parallel_size` such devices.
    """

    backend: Literal["torch", "llama_cpp", "vllm", "roofline"]
    device: Name | None = None
    tensor_parallel_size: Positive | None = None
    scenarios: Annotated[tuple[Scenario, ...], Field(min_length=1)]
    precision: Precision
    served_precision: ServedPrecision
    num_threads: Positive
    warmups: Positive
    repeats: Positive

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
        if self.device not in DEVICES:
            raise ValueError(
                f"block_profile.device is {self.device!r}; backend 'roofline' needs one of {', '.join(DEVICES)}"
            )
        if self.served_precision == "fp8" and not DEVICES[self.device].computes_fp8:
            able = ", ".join(name for name, device in DEVICES.items() if device.computes_fp8)
            raise ValueError(
                f"block_profile.device {self.device} does not compute in the served_precision fp8; choose {able}, or "
                "served_precision: bf16"
            )
        return self
