"""One finished run, published once for all report tests."""

from pathlib import Path

import pytest

from pipeline.report.drawings import draw
from pipeline.report.inputs import ReportInputs, read_inputs
from tests.pipeline.report.builders import publish_run


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return publish_run(tmp_path_factory.mktemp("repository") / "store")


@pytest.fixture(scope="session")
def inputs(artifacts: dict[str, Path]) -> ReportInputs:
    return read_inputs(artifacts)


@pytest.fixture(scope="session")
def figures(inputs: ReportInputs) -> dict[str, str]:
    return draw(inputs)
