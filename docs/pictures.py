"""Take the pictures of reports in docs/figures/ anew, in a headless Chromium: the page of a run at
the width of a phone, of a tablet and of a desk, light and dark, side by side.

apt-train -p gpt5_moe_mini --plugin report --output run && python docs/pictures.py run
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WIDTHS = (390, 820, 1440)
THEMES = ("light", "dark")


@contextmanager
def opened(page: Path) -> Iterator[Any]:
    """A page of a file in a browser."""
    from tests.plugins.browser import opened_page

    with tempfile.TemporaryDirectory() as folder, opened_page(page.as_uri(), Path(folder)) as found:
        yield found


def show(page: Any, width: int, theme: str, *, height: int = 900, scale: float = 1.0) -> None:
    """Give the window a width in CSS pixels, and the theme that its user prefers."""
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=scale,
        mobile=width < 500,
    )
    page.call(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-color-scheme", "value": theme}],
    )
    page.js("scrollTo(0, 0)")


def picture(page: Any, path: Path, *, height: int | None = None) -> None:
    """Write what the page shows, down to ``height`` or to its end, as PNG."""
    import base64

    width, whole = page.js("[innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": min(whole, height or whole), "scale": 1}
    found = page.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    path.write_bytes(base64.b64decode(found["data"]))


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="the page of a report")
    parser.add_argument("folder", type=Path, help="where to write the pictures")
    parser.add_argument("--height", type=int, help="pixels of the page from its top on; all")
    given = parser.parse_args(args)
    given.folder.mkdir(parents=True, exist_ok=True)
    with opened(given.page.resolve()) as page:
        for theme in THEMES:
            for width in WIDTHS:
                show(page, width, theme)
                name = f"{given.page.stem}-{theme}-{width}.png"
                picture(page, given.folder / name, height=given.height)
        requests = [url for url in page.requests if not url.startswith(("file:", "data:"))]
        for url in requests:
            print(f"it asks for {url}", file=sys.stderr)
    return int(bool(requests))


if __name__ == "__main__":
    sys.exit(main())
