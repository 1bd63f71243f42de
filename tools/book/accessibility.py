"""Look for what keeps readers out of the built pages, with axe, in a headless Chromium.

    python tools/book/accessibility.py [PAGE ...]

Each page is opened wide and narrow, in light and in dark; one that runs the model is looked at
before it does and while it does. Findings that axe calls serious or critical end in exit code 1,
and so does what makes a page wider than its window. axe-core comes from the npm registry; its
version is below.
"""

import argparse
import contextlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import chromium
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
AXE = "axe-core@4.14.1"
WIDTHS = {"wide": 1400, "narrow": 390}
SCHEMES = ("light", "dark")
TIMEOUT = 180_000
"""Milliseconds that a page may take on a machine that is busy with other things."""
GRAVE = ("serious", "critical")
ANSWERED = """
() => [...document.querySelectorAll(".gcvit-page .said")].every(
  (status) => status.textContent.includes("computed in"))
"""
UNFOLD = """
for (const folded of document.querySelectorAll(".gcvit-page details")) folded.open = true
"""
WIDER = """
() => {
  const root = document.documentElement, width = root.clientWidth;
  if (root.scrollWidth <= width) return [];
  const isCut = (node) => node !== document.body
    && (getComputedStyle(node).overflowX !== "visible" || isCut(node.parentElement));
  const wide = [...document.body.querySelectorAll("*")].filter((node) => {
    const {left, right} = node.getBoundingClientRect();
    return left < width && right > width && !isCut(node.parentElement);
  });
  const places = wide.filter((node) => !wide.some((other) => other.parentElement === node));
  return [{
    id: "width", impact: "serious", help: "A page is no wider than its window",
    places: places.map((node) => [
      `${node.parentElement.localName} > ${node.localName}`,
      `The page has ${root.scrollWidth} px, the window ${width} px.`, node.outerHTML,
    ]),
  }];
}
"""
RUN = """
async (scheme) => {
  document.documentElement.dataset.mode = document.documentElement.dataset.theme = scheme;
  await new Promise((done) => setTimeout(done, 300));
  const {violations} = await axe.run(document, {resultTypes: ["violations"]});
  return violations.map((one) => ({
    id: one.id, impact: one.impact, help: one.help,
    places: one.nodes.map((node) => [node.target.join(" "), node.failureSummary, node.html]),
  }));
}
"""


def axe():
    """Return axe-core's script."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", "--silent", AXE], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as packed:
            return packed.extractfile("package/axe.min.js").read().decode()


def findings(browser, script, page, width, scheme):
    """Return the findings on a page at a width, in light or in dark."""
    viewport = {"width": width, "height": 900}
    with contextlib.closing(browser.new_page(viewport=viewport, color_scheme=scheme)) as opened:
        opened.set_default_timeout(TIMEOUT)
        opened.goto(page.resolve().as_uri())
        opened.evaluate(f"{script}; 0")
        seen = opened.evaluate(RUN, scheme) + opened.evaluate(WIDER)
        if models := opened.locator(".gcvit-page .load").all():
            for button in models:
                button.click()
            opened.wait_for_function(ANSWERED)
            opened.evaluate(UNFOLD)
            opened.wait_for_selector(".gate-sums p, .looks figure")
            seen += opened.evaluate(RUN, scheme) + opened.evaluate(WIDER)
        return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="default: all of the built book")
    pages = parser.parse_args().pages or sorted((ROOT / "_build" / "html").glob("*.html"))
    if not pages:
        parser.error("there is no book yet: run make book first")
    script, grave, rest = axe(), 0, 0
    with (
        sync_playwright() as playwright,
        contextlib.closing(chromium.launch(playwright)) as browser,
    ):
        for page in pages:
            seen = {}
            for width_name, width in WIDTHS.items():
                for scheme in SCHEMES:
                    for one in findings(browser, script, page, width, scheme):
                        key = one["impact"], one["id"], one["help"]
                        for place, why, html in one["places"]:
                            where = seen.setdefault(key, {}).setdefault(place, (why, html, {}))
                            where[2][f"{width_name} {scheme}"] = None
            for (impact, name, says), places in sorted(seen.items()):
                grave += (impact in GRAVE) * len(places)
                rest += (impact not in GRAVE) * len(places)
                print(f"{page.name}: {impact}: {name}: {says}")
                for place, (why, html, when) in places.items():
                    print(f"    {place} ({', '.join(when)})\n        {html[:150]}")
                    print("        " + why.splitlines()[-1].strip())
    print(
        f"{len(pages)} pages, {len(WIDTHS)} widths, {' and '.join(SCHEMES)}: {grave} places with "
        f"serious or critical findings, {rest} with lesser ones"
    )
    return 1 if grave else 0


if __name__ == "__main__":
    sys.exit(main())
