"""The route through the UI that the tests check and `make screenshots` pictures: run, watch, read, cancel, report."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Page

from tests.browser.server import serve, wait_for
from tests.browser.tour import INSTALL, Tour, natural_size_px, open_browser

WATCHED = "kd_checkpoint"
GONE_WITHIN_S = 30.0
SIZES = "drawings => drawings.map(d => d.getBoundingClientRect()).map(r => [Math.round(r.width), Math.round(r.height)])"
Size = tuple[int, int]


@dataclass(kw_only=True)
class Seen:
    """What the pages said, in the order of the route."""

    home: Path
    graph: set[str] = field(default_factory=set)
    automation: str = ""
    schedule_is_on: bool = True
    live_log_line: str = ""
    live_page: list[str] = field(default_factory=list)
    summaries: dict[str, str] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    pictures: dict[str, Size] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    num_processes_before_cancel: int = 0
    num_processes_after_cancel: int = -1
    canceled_page: str = ""
    report_text: str = ""
    report_errors: list[str] = field(default_factory=list)
    report_requests: list[str] = field(default_factory=list)
    page_errors: list[str] = field(default_factory=list)


@contextmanager
def open_tour(home: Path, *, browser: str | None, pictures: Path | None = None) -> Iterator[Tour]:
    """Serve a fresh home and open a page on it.

    Raises:
        RuntimeError: where there is no browser; it says how to install one.
    """
    if browser is None:
        raise RuntimeError(f"no Chromium was found; {INSTALL}")
    with serve(home) as served, open_browser(browser) as chromium:
        yield Tour(page=chromium.new_context().new_page(), served=served, pictures=pictures)


def walk(tour: Tour) -> Seen:
    """Take the whole route, in four to five minutes on two cores."""
    seen = Seen(home=tour.served.home)
    _see_automation(tour, seen)
    tour.launch_all_stages("fused")
    _watch_training(tour, seen)
    _read_assets(tour, seen)
    seen.graph = tour.see_graph()
    _cancel(tour, seen)
    _read_report(tour, seen)
    seen.page_errors = tour.errors
    return seen


def _see_automation(tour: Tour, seen: Seen) -> None:
    page = tour.page
    page.goto(tour.served.url)
    page.get_by_role("link", name="Automation").click()
    page.get_by_text("rerun_stale").first.wait_for()
    seen.automation = page.locator("body").inner_text()
    seen.schedule_is_on = page.locator("input[type=checkbox]").last.is_checked()
    tour.picture("automation")


def _watch_training(tour: Tour, seen: Seen) -> None:
    run_url = tour.page.url
    # An ETA that is neither unknown nor over: the stage is at work.
    seen.live_log_line = tour.watch_log("KD steps", r"^\d+/\d+ KD steps .*eta [1-9]\d*(s|m\d\ds)$")
    tour.picture("run-live")
    tour.open_asset(WATCHED)
    seen.live_page = tour.plot_events()
    tour.picture("asset-live")
    tour.page.goto(run_url)
    tour.wait_for_status("Success")


def _read_assets(tour: Tour, seen: Seen) -> None:
    for name, picture in ((WATCHED, "curve"), ("mip_solution", "architecture"), ("evaluation", "quality")):
        tour.open_asset(name)
        tour.summary().wait_for()
        tour.page.get_by_text("Latest check results").wait_for()
        seen.summaries[name] = tour.summary().inner_text()
        seen.keys[name] = tour.metadata_keys()
        tour.picture(name.replace("_", "-"))
        if name == WATCHED:
            seen.pictures["sparkline"] = natural_size_px(tour.summary().locator("img"))
        seen.pictures[picture] = tour.open_picture(f"picture: {picture}")
        tour.picture(f"{name.replace('_', '-')}-{picture}")
        tour.close_dialog()
        tour.open_asset(name, "Checks")
        for loaded in ("Latest execution", "Succeeded", "Passed"):  # each is asked for on its own
            tour.page.get_by_text(loaded, exact=True).first.wait_for()
        seen.checks[name] = tour.page.locator("body").inner_text()
        if name == WATCHED:
            tour.picture("checks")


def _cancel(tour: Tour, seen: Seen) -> None:
    tour.launch_all_stages("light")
    tour.watch_log("KD steps", r"^\d+/\d+ KD steps ")
    seen.num_processes_before_cancel = len(tour.served.stage_processes())
    tour.terminate()
    tour.wait_for_status("Canceled", within_ms=60_000)
    wait_for(lambda: not tour.served.stage_processes(), within_s=GONE_WITHIN_S, what="the stage's processes to end")
    seen.num_processes_after_cancel = len(tour.served.stage_processes())
    seen.canceled_page = tour.page.locator("body").inner_text()
    tour.picture("canceled")


def _read_report(tour: Tour, seen: Seen) -> None:
    tour.open_asset("report")
    tour.summary().wait_for()
    found = re.search(r"/\S+/report\.html", tour.metadata("open").inner_text())
    assert found, "the page of the asset `report` names no report.html"
    page: Page = tour.page.context.new_page()
    page.set_viewport_size(tour.page.viewport_size or {"width": 1500, "height": 1000})
    page.on("console", lambda message: seen.report_errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: seen.report_errors.append(str(error)))
    page.on("request", lambda request: seen.report_requests.append(request.url[:200]))
    page.goto(Path(found.group()).as_uri())
    page.wait_for_load_state("networkidle")
    seen.report_text = page.locator("body").inner_text()
    # Its figures are drawings within the page, not files.
    for index, (width_px, height_px) in enumerate(page.locator("svg:visible").evaluate_all(SIZES)):
        seen.pictures[f"report {index}"] = (width_px, height_px)
    page.evaluate("window.scrollTo(0, 0)")
    Tour(page=page, served=tour.served, pictures=tour.pictures).picture("report")
    page.close()
