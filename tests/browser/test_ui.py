"""The UI in a real browser: the graph, a run watched and one cancelled, what the pages say, and the HTML report.

One walk through the pages (walk.py, about four minutes) is shared by all tests; each looks at one thing that was seen.
Run with `make test-ui`; without a Chromium the tests skip, except there.
"""

import importlib.util
import json
import os
import re
import sys
from typing import TYPE_CHECKING, NoReturn

import pytest

from assets.highlights import HIGHLIGHTS
from pipeline.stages.registry import STAGES
from tests.browser.server import WATCHED_TOKENS

if TYPE_CHECKING:
    from tests.browser.walk import Seen

REQUIRED = bool(os.environ.get("REFIT_REQUIRE_BROWSER"))

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]


def _do_without(reason: str) -> NoReturn:
    if REQUIRED:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> "Seen":
    """What one walk through the pages of a fresh home saw."""
    if importlib.util.find_spec("playwright") is None:
        _do_without("playwright is not installed; `.venv/bin/python -m pip install -e '.[dev]'` installs it")
    from tests.browser.tour import INSTALL, find_browser
    from tests.browser.walk import open_tour, walk

    browser = find_browser(os.environ.get("CHROMIUM"))
    if browser is None:
        _do_without(f"no Chromium was found; {INSTALL}")
    with open_tour(tmp_path_factory.mktemp("ui"), browser=browser) as tour:
        return walk(tour)


def test_graph_shows_every_stage_and_group(seen: "Seen"):
    # The page shortens a long name in its middle: reasoning…_dataset.
    drawn = {name.partition("…")[0] for name in seen.graph if name}

    for stage in STAGES:
        assert stage.name in drawn or any(len(name) > 5 and stage.name.startswith(name) for name in drawn), stage.name
        assert stage.group in drawn


def test_schedule_is_listed_and_off(seen: "Seen"):
    assert "rerun_stale" in seen.automation
    assert not seen.schedule_is_on


def test_training_is_watched_with_progress_loss_and_eta(seen: "Seen"):
    match = re.match(r"(\d+)/(\d+) KD steps +loss ([\d.]+) .*eta ", seen.live_log_line)

    assert match, seen.live_log_line
    assert 0 < int(match[1]) < int(match[2])


def test_loss_is_plotted_while_the_stage_trains(seen: "Seen"):
    assert {"loss", "step", "tokens_per_second"} <= set(seen.live_page)
    # What only a finished stage has is not there yet.
    assert "final_loss" not in seen.live_page


def test_summary_comes_first_pictures_second_and_identity_last(seen: "Seen"):
    for name, keys in seen.keys.items():
        assert keys[0] == "at a glance", name
        assert keys[1].startswith("picture: "), name
        assert keys[-1] == "path", name


def test_summary_reads_as_labels_with_units(seen: "Seen"):
    assert re.search(r"KL to the parent after\s+[\d.e-]+ nats/token", seen.summaries["kd_checkpoint"])
    assert re.search(rf"Trained on\s+{WATCHED_TOKENS:,} tokens", seen.summaries["kd_checkpoint"])
    assert re.search(r"Predicted decode speed-up\s+[\d.]+x", seen.summaries["mip_solution"])
    assert re.search(r"Perplexity, final\s+[\d.]+", seen.summaries["evaluation"])


def test_every_highlight_is_a_number_that_its_stage_reports(seen: "Seen"):
    for name, highlight in HIGHLIGHTS.items():
        path = next((seen.home / "store" / name).glob("*/result.json"))
        result = json.loads(path.read_text(encoding="utf-8"))["result"]
        assert set(highlight.numbers) <= set(result["metrics"]), name
        if highlight.sparkline:
            assert highlight.sparkline in result["tables"]["training_curve"]["columns"], name


@pytest.mark.parametrize("name", ["sparkline", "curve", "architecture", "quality"])
def test_picture_is_rendered_by_the_browser(seen: "Seen", name: str):
    width_px, height_px = seen.pictures[name]

    assert width_px > 0
    assert height_px > 0


@pytest.mark.parametrize("name", ["kd_checkpoint", "mip_solution", "evaluation"])
def test_checks_are_passed_on_their_page(seen: "Seen", name: str):
    text = seen.checks[name]

    for check in next(stage.checks for stage in STAGES if stage.name == name):
        assert re.search(rf"{check.name}\s+Succeeded", text), text
    assert "Passed" in text


def test_run_terminated_by_a_click_is_canceled_and_leaves_no_process(seen: "Seen"):
    assert seen.num_processes_before_cancel > 0
    assert seen.num_processes_after_cancel == 0
    assert "Canceled" in seen.canceled_page


def test_report_opens_from_disk_without_errors_or_remote_requests(seen: "Seen"):
    assert len(seen.report_text) > 1000
    assert seen.report_errors == []
    assert {url.partition(":")[0] for url in seen.report_requests} <= {"file", "data"}
    figures = [size for name, size in seen.pictures.items() if name.startswith("report")]
    assert len(figures) >= 5
    assert all(width_px > 100 and height_px > 50 for width_px, height_px in figures)


def test_pages_raised_no_script_errors(seen: "Seen"):
    assert seen.page_errors == []
