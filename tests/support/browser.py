"""A page opened in headless Chromium, and what a script in it finds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

_CATCH = "<script>window.failures=[];addEventListener('error',e=>failures.push(e.message));</script>"


def probe(text: str, script: str, folder: Path, theme: str = "light", width: int = 1240) -> dict[str, Any]:
    """What ``script``, run in a block at the end of the page, writes into the title as JSON; errors are in
    ``window.failures``."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: the page is tested in a real browser")
    file = folder / "probe.html"
    page = text.replace("<main>", _CATCH + "<main>").replace("</body>", f"<script>{{{script}}}</script></body>")
    file.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={folder}/profile", "--virtual-time-budget=2000", "--dump-dom",
         f"file://{file}?theme={theme}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.S)
    assert title is not None, done.stdout[:500]
    found: dict[str, Any] = json.loads(unescape(title[1]))
    return found
