"""The report in a real browser, where Chromium is installed: nothing overlaps, nothing is cut.

A script in a copy of the page measures it after layout; --dump-dom hands over what it found.
Screenshots go to the folder in MNET_SCREENSHOTS, for people.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import report_samples as samples

from mnet_kernels import report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

#: Chromium's own window is never narrower than 500 pixels, a frame in it is.
FRAME = (
    '<!DOCTYPE html><pre id="found"></pre><iframe width="{}" height="2000" srcdoc="{}"></iframe>'
)
CHECK = """
<script>
const found = { width: innerWidth, overlaps: [], cut: [], faint: [], texts: 0, sorted: null };
for (const folded of document.querySelectorAll("details")) folded.open = true;
const box = e => e.getBoundingClientRect();
for (const svg of document.querySelectorAll("svg[role=img]")) {
  const frame = box(svg);
  if (!frame.width) continue;
  const texts = [...svg.querySelectorAll("text")].map(t => [box(t), t.textContent]);
  found.texts += texts.length;
  texts.forEach(([a, text], i) => {
    if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 ||
        a.bottom > frame.bottom + 1) found.cut.push(text);
    for (const [b, other] of texts.slice(0, i))
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
          Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
        found.overlaps.push([text, other]);
  });
}
for (const e of document.querySelectorAll("h1, h2, h3, p, li, dt, dd, summary, a")) {
  if (e.classList.contains("skip")) continue;
  const { left, right, width } = box(e);
  const wide = e.clientWidth && e.scrollWidth > e.clientWidth + 1;
  if (width && (right > innerWidth + 1 || left < -1 || wide))
    found.cut.push(e.textContent.slice(0, 60));
}
found.scrolls = document.documentElement.scrollWidth > innerWidth;
const light = color => {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= 0.03928 ?
    v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = e => {
  for (; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if (!color.endsWith(", 0)")) return color;
  }
};
for (const e of document.querySelectorAll("p, li, dt, dd, h1, h2, td, th, svg[role=img] text")) {
  const style = getComputedStyle(e);
  const [a, b] = [light(e.tagName == "text" ? style.fill : style.color), light(ground(e))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) found.faint.push([e.textContent.slice(0, 40), contrast]);
}
const table = document.querySelector("#rows table");
const heading = [...table.querySelectorAll("th")].find(th => th.textContent.trim() == "Speed-up");
const column = () => [...table.tBodies[0].rows].map(r => +r.cells[heading.cellIndex].dataset.value);
heading.firstElementChild.click();
const up = column(), ariaUp = heading.ariaSort;
heading.firstElementChild.click();
found.sorted = { up, down: column(), ariaUp, ariaDown: heading.ariaSort };
parent.document.getElementById("found").textContent = JSON.stringify(found);
</script></body>"""


def browse(tmp_path: Path, page: str, *flags: str) -> str:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    (folder / "cpu.json").write_text(json.dumps(samples.full_bench()))
    (folder / "tradeoff.json").write_text(json.dumps(samples.tradeoff()))
    (folder / "cut.json").write_text("{")
    for name in ("native", "a-run-with-quite-a-long-name-of-its-own"):
        (folder / name).mkdir()
        (folder / name / "metrics.csv").write_text(samples.metrics())
    return report.render(report.read([folder]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overlaps_or_is_cut(tmp_path, page, width, scheme):
    flags = ["--window-size=1400,2100"]
    if scheme == "dark":
        flags.append("--blink-settings=preferredColorScheme=0")
    checked = FRAME.format(width, html.escape(page.replace("</body>", CHECK)))
    dom = browse(tmp_path, checked, *flags, "--dump-dom")
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)[1]))
    assert found["width"] == width
    assert found["texts"] > 100
    assert found["overlaps"] == []
    assert found["cut"] == []
    assert not found["scrolls"]  # tables scroll inside of themselves
    assert found["faint"] == []
    order = found["sorted"]
    assert order["up"] == sorted(order["up"])
    assert order["down"] == sorted(order["up"], reverse=True)
    assert (order["ariaUp"], order["ariaDown"]) == ("ascending", "descending")
    if folder := os.environ.get("MNET_SCREENSHOTS"):
        shot = Path(folder) / f"report-{width}-{scheme}.png"
        flags[0] = f"--window-size={width},6000"
        browse(tmp_path, page, *flags, f"--screenshot={shot}")
        assert shot.stat().st_size > 50_000
