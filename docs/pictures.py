"""Take the pictures of reports in docs/figures/ anew, in a headless Chromium.

report.png has the top of a page; report-light.png and report-dark.png have it at the widths of a
phone, a tablet and a desk.

apt-report RUN --output run.html && python docs/pictures.py run.html
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WIDTHS = (390, 820, 1440)
THEMES = ("light", "dark")
HEIGHT, GAP = 1500, 8
"""CSS pixels of each page from its top on, and pixels between two."""


def main(args: Sequence[str] | None = None) -> int:
    """1 where the page asks for anything from elsewhere."""
    from PIL import Image

    from tests.plugins.browser import opened_page

    parser = argparse.ArgumentParser(description="Take the pictures of reports anew.")
    parser.add_argument("page", type=Path, help="the page of a report")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "figures")
    given = parser.parse_args(args)
    url = given.page.resolve().as_uri()
    with tempfile.TemporaryDirectory() as name, opened_page(url, Path(name)) as page:
        for theme in THEMES:
            parts = []
            for width in WIDTHS:
                page.show(width, theme)
                parts.append(Path(name) / f"{width}.png")
                page.picture(parts[-1], height=HEIGHT, scale=0.5)
            pictures = [Image.open(part) for part in parts]
            whole = Image.new("RGB", (sum(p.width + GAP for p in pictures) - GAP, HEIGHT // 2))
            at = 0
            for each in pictures:
                whole.paste(each, (at, 0))
                at += each.width + GAP
            _save(whole, given.folder / f"report-{theme}.png")
        page.show(1200, "light")
        page.picture(parts[0], height=860)
        _save(Image.open(parts[0]), given.folder / "report.png")
        foreign = [url for url in page.requests if not url.startswith(("file:", "data:"))]
        for url in foreign:
            print(f"it asks for {url}", file=sys.stderr)
    return int(bool(foreign))


def _save(picture: Any, path: Path) -> None:
    """Save with few colours, which such a page has: a small file."""
    picture.convert("RGB").quantize(128).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    sys.exit(main())
