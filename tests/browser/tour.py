"""A tour of the UI: each step clicks as a person would, returns what it read from the page, and may keep a picture."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.browser.server import Served

VIEWPORT_PX = (1500, 1000)
GRAPH_VIEWPORT_PX = (2000, 1400)
SIDEBAR_PX = 366
INSTALL = "install a browser (on Debian: apt-get install -y chromium) and name it in CHROMIUM unless it is on PATH"
STEP_MS = 30_000
RUN_MS = 420_000
# The first cell of every row that is not itself within a cell; the header row comes first.
OUTER_KEYS = """rows => rows
    .filter(row => !row.parentElement.closest("td") && row.children.length === 3)
    .map(row => row.children[0].innerText.trim())
    .slice(1)"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser(named: str | None) -> str | None:
    """Return the path of a Chromium: the one named, or the first on PATH; None where there is none."""
    return shutil.which(named) if named else next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def open_browser(executable: str) -> Iterator[Browser]:
    """Start the browser without a window; it talks to nobody by itself."""
    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, as in containers; the pages are our own.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass(kw_only=True)
class Tour:
    """One browser page over a served UI; pictures are kept as `pictures`/ui-<name>.png where a directory is given."""

    page: Page
    served: Served
    pictures: Path | None = None
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_viewport_size({"width": VIEWPORT_PX[0], "height": VIEWPORT_PX[1]})
        self.page.set_default_timeout(STEP_MS)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def picture(self, name: str, *, left_px: int = 0) -> None:
        """Keep what is on the screen, without its leftmost pixels."""
        size = self.page.viewport_size
        if self.pictures is not None and size is not None:
            self.page.screenshot(
                path=self.pictures / f"ui-{name}.png",
                clip={"x": left_px, "y": 0, "width": size["width"] - left_px, "height": size["height"]},
                animations="disabled",
            )

    def see_graph(self) -> set[str]:
        """Expand every group of the lineage page and return the names of what is drawn."""
        page = self.page
        page.goto(self.served.url)
        page.locator("a[href='/asset-groups']").last.click()
        page.set_viewport_size({"width": GRAPH_VIEWPORT_PX[0], "height": GRAPH_VIEWPORT_PX[1]})
        page.get_by_role("button", name="Hide navigation").click()
        self._graph_setting("Expand all groups")
        self._graph_setting("Change graph to vertical orientation")
        page.reload()  # the view is fitted to the graph when it opens
        expect(page.get_by_text("kd_checkpoint", exact=True).last).to_be_visible()
        page.wait_for_timeout(2000)
        names = {line.strip() for line in page.locator("body").inner_text().splitlines()}
        self.picture("graph", left_px=SIDEBAR_PX)
        page.locator("[aria-label=panel_show_left]").first.click()
        page.set_viewport_size({"width": VIEWPORT_PX[0], "height": VIEWPORT_PX[1]})
        return names

    def launch_all_stages(self, partition: str) -> None:
        """Launch the job over every stage for one target, and open the run's page."""
        page = self.page
        page.goto(self.served.url)
        page.get_by_role("link", name="Jobs").click()
        page.get_by_role("link", name="all_stages").first.click()
        page.get_by_role("button", name="Materialize all").first.click()
        page.get_by_text("Select a partition or create one").click()
        page.get_by_role("menuitem").filter(has_text=partition).or_(
            page.get_by_text(partition, exact=True).locator("visible=true")
        ).last.click()
        page.keyboard.press("Escape")
        self.picture("launch")
        page.get_by_role("button", name="Launch 1 run").click()
        page.get_by_role("link", name="View", exact=True).or_(
            page.get_by_role("button", name="View", exact=True)
        ).last.click()
        page.wait_for_url(re.compile(r"/runs/"))

    def wait_for_status(self, status: str, *, within_ms: float = RUN_MS) -> None:
        """Wait until the open run's page shows a status."""
        expect(self._status(status)).to_be_visible(timeout=within_ms)

    def watch_log(self, text: str, pattern: str, *, within_ms: float = RUN_MS) -> str:
        """Filter the open run's log and return the first line that matches, once it is there."""
        page = self.page
        box = page.get_by_placeholder("Filter…")
        box.fill(text)
        line = page.get_by_text(re.compile(pattern)).first
        expect(line).to_be_visible(timeout=within_ms)
        box.blur()  # puts the list of suggestions away
        return line.inner_text()

    def terminate(self) -> None:
        """Terminate the run whose page is open, as its owner would."""
        page = self.page
        page.get_by_role("button", name="Terminate").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("button", name=re.compile("Terminate")).last.click()

    def open_asset(self, name: str, tab: str = "Overview") -> None:
        """Open an asset's page from the catalog's search, at one of its tabs."""
        page = self.page
        page.goto(f"{self.served.url}/assets/{name}")
        page.get_by_role("link", name=tab, exact=True).or_(page.get_by_role("tab", name=tab, exact=True)).last.click()
        expect(page.get_by_text(name).first).to_be_visible()

    def plot_events(self) -> list[str]:
        """Switch the open asset's metadata to plots over time and return the titles of the plots."""
        page = self.page
        page.get_by_role("button", name="Plots").click()
        page.get_by_role("button", name="Events").click()
        expect(page.locator("canvas").first).to_be_visible()
        page.wait_for_timeout(1500)  # charts draw themselves after their data has come
        return page.locator("body").inner_text().splitlines()

    def summary(self) -> Locator:
        """Return the cell of the open asset's page that sums it up."""
        return self.metadata("at a glance")

    def metadata(self, key: str) -> Locator:
        """Return the row of the open asset's metadata with this key."""
        return self.page.locator("tr").filter(has=self.page.get_by_text(key, exact=True)).first

    def metadata_keys(self) -> list[str]:
        """Return the keys of the open asset's metadata, from top to bottom."""
        return self.page.locator("tr").evaluate_all(OUTER_KEYS)

    def open_picture(self, key: str) -> tuple[int, int]:
        """Open a picture among the metadata and return its width and height once the browser has drawn it."""
        self.metadata(key).get_by_text("[Show Markdown]").click()
        image = self.page.get_by_role("dialog").locator("img").first
        return natural_size_px(image)

    def close_dialog(self) -> None:
        """Close the open dialog."""
        self.page.get_by_role("button", name="Close").click()
        expect(self.page.get_by_role("dialog")).to_have_count(0)

    def _status(self, status: str) -> Locator:
        return self.page.get_by_text(status, exact=True).first

    def _graph_setting(self, name: str) -> None:
        self.page.locator("[aria-label=settings]").last.click()
        self.page.get_by_role("menuitem", name=name).click()
        self.page.keyboard.press("Escape")
        self.page.wait_for_timeout(1500)  # the layout is computed in a worker


def natural_size_px(image: Locator) -> tuple[int, int]:
    """Return the size of a picture as decoded by the browser, 0 x 0 where it could not be.

    Raises:
        AssertionError: when there is no such picture.
    """
    expect(image).to_be_visible()
    width, height = image.evaluate(
        "async image => { await image.decode().catch(() => {}); return [image.naturalWidth, image.naturalHeight]; }"
    )
    return width, height
