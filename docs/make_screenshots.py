"""Takes the pictures of docs/ui.md from the UI in a real browser: `make screenshots`, about five minutes.

The route is the one that tests/browser checks, so a picture cannot show what a test has not seen.
"""

import os
import sys
import tempfile
from pathlib import Path

from tests.browser.tour import find_browser
from tests.browser.walk import open_tour, walk

OUT = Path(__file__).parent / "images"
MAX_PICTURE_BYTES = 400_000


def main() -> None:
    """Walk through the pages and say what was written."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="refit-ui-") as home,
        open_tour(Path(home), browser=find_browser(os.environ.get("CHROMIUM")), pictures=OUT) as tour,
    ):
        walk(tour)
    for path in sorted(OUT.glob("ui-*.png")):
        size_bytes = path.stat().st_size
        sys.stdout.write(f"{path}  {size_bytes / 1000:.0f} kB\n")
        if size_bytes > MAX_PICTURE_BYTES:
            raise SystemExit(f"{path} has {size_bytes:,} bytes; at most {MAX_PICTURE_BYTES:,} are wanted: crop it")


if __name__ == "__main__":
    main()
