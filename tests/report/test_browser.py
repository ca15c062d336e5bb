"""The page in a real browser, where one is installed: it fits a phone, opens at once, and shows in light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import write_index

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

PROBE = """<script>addEventListener("load", () => setTimeout(() => {
const wide = document.documentElement, nav = performance.getEntriesByType("navigation")[0];
document.title = JSON.stringify({
  overflow: wide.scrollWidth - innerWidth, open: nav.domContentLoadedEventEnd,
  ground: getComputedStyle(document.body).backgroundColor, figures: document.querySelectorAll("figure svg").length,
  silent: [...document.querySelectorAll("[role=img]")].filter((one) => !one.getAttribute("aria-label")).length,
});}, 0));</script>"""


@pytest.fixture(scope="module")
def page(new_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    maker = new_maker(tmp_path_factory.mktemp("browser") / "evaluations")
    maker.table("hificl-table1")
    index = write_index(maker.params(**{"hificl-table1": maker.definition()}), maker.folder, maker.folder.parent).page
    probed = index.with_name("probed.html")
    probed.write_text(index.read_text().replace("</head>", PROBE + "</head>"))
    return probed


def seen(page: Path, profile: Path, width: int, *, dark: bool) -> dict[str, Any]:
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}", f"--window-size={width},900", "--virtual-time-budget=3000", *scheme,
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-500:]
    return json.loads(title.group(1).replace("&quot;", '"'))


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_opens_at_once_and_follows_the_scheme(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    found = seen(page, tmp_path, width, dark=dark)
    assert found["overflow"] <= 0
    print(f"opened in {found['open']:.0f} ms, {page.stat().st_size / 1000:.0f} kB")
    assert found["open"] < 1000
    assert found["figures"] >= 1 and found["silent"] == 0
    red = int(re.findall(r"\d+", found["ground"])[0])
    assert (red < 60) == dark
