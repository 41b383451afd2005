"""Every runtime computes what our model computes, or refuses where the portability rules say that it cannot."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError
from pipeline.model.export_decilm import export_decilm
from pipeline.model.export_gguf import export_gguf
from pipeline.model.heterogeneous import HeterogeneousLlamaForCausalLM
from pipeline.model.portability import runtime_support
from tests.serving.cases import CASES, write_case
from tests.serving.runtimes import (
    Answer,
    RuntimeRefusedError,
    ask_llama_cpp,
    ask_torch,
    ask_transformers,
    read_answer,
    run_driver,
)
from tests.serving.table import ROWS, Row

pytestmark = [pytest.mark.serving, pytest.mark.timeout(3000)]

END_TOKENS = (0, 2)  # <|endoftext|> and <|im_end|> of the byte tokenizer
MAX_LOGPROB_DIFFERENCE = 1e-3
PROMPT = [1] + [(37 * position + 11) % 256 + 3 for position in range(40)]


@dataclass(frozen=True)
class Written:
    """One case on disk, and what our model says of the prompt."""

    directory: Path
    model: HeterogeneousLlamaForCausalLM
    expected: Answer


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Write each case once, when it is first asked for."""
    found: dict[str, Written] = {}

    def write(name: str) -> Written:
        if name not in found:
            directory = tmp_path_factory.mktemp("case")
            model = write_case(directory / "checkpoint", CASES[name])
            export_decilm(directory / "checkpoint", out_dir=directory / "export")
            found[name] = Written(directory=directory, model=model, expected=ask_torch(model, PROMPT))
        return found[name]

    return write


@pytest.fixture(scope="module")
def answers(
    written: Callable[[str], Written], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Path]]:
    """Run the script of a runtime over all cases once, when it is first asked for."""

    @functools.cache
    def run(runtime: str) -> dict[str, Path]:
        return run_driver(
            runtime,
            {name: written(name).directory / "export" for name in CASES},
            PROMPT,
            vocab_size=next(iter(CASES.values())).vocab_size,
            work_dir=tmp_path_factory.mktemp(runtime),
        )

    return run


def until_end(ids: list[int]) -> list[int]:
    """The tokens before the first that ends an answer: llama.cpp's server stops there, others go on."""
    return list(itertools.takewhile(lambda token: token not in END_TOKENS, ids))


def gguf_of(written: Written) -> Path:
    path = written.directory / "model.gguf"
    export_gguf(written.directory / "checkpoint", path, precision="fp32")
    return path


def ask(runtime: str, name: str, case: Written, answers: Callable[[str], dict[str, Path]]) -> Answer:
    match runtime:
        case "transformers":
            return ask_transformers(case.directory / "export", PROMPT)
        case "llama.cpp":
            return ask_llama_cpp(gguf_of(case), PROMPT, vocab_size=case.model.architecture.vocab_size)
        case "vLLM":
            return read_answer(answers("vllm")[name])
        case _:
            return read_answer(answers("mlx")[name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("runtime", ["transformers", "llama.cpp", "mlx-lm", "vLLM"])
def test_runtime_computes_what_we_do_or_refuses_as_predicted(
    runtime: str, name: str, written: Callable[[str], Written], answers: Callable[[str], dict[str, Path]]
):
    support = {item.runtime: item for item in runtime_support(CASES[name])}[runtime]
    case = written(name)
    if support.runs == "cannot":
        with pytest.raises((RuntimeRefusedError, CheckpointError)) as refusal:
            ask(runtime, name, case, answers)
        ROWS.append(Row.refused(runtime, name, reason=str(refusal.value)))
        return
    answer = ask(runtime, name, case, answers)
    difference = float((answer.logprobs_TV - case.expected.logprobs_TV).abs().max())
    is_same_text = until_end(answer.greedy) == until_end(case.expected.greedy)
    ROWS.append(Row.ran(runtime, name, difference=difference, is_same_text=is_same_text, version=answer.version))
    assert answer.logprobs_TV.shape == case.expected.logprobs_TV.shape
    assert difference <= MAX_LOGPROB_DIFFERENCE
    assert is_same_text
