"""Try a page of explain.py in headless Chromium: every control moves what it says, and nothing complains.

    python -m tools.teach.browse page.html --shots shots

Prints a line for each check and ends with the number of those that failed; `--shots` keeps pictures, light and dark.
It needs the package playwright, and a Chromium, Chrome or Edge on this machine.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "google-chrome", "microsoft-edge")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
PATIENCE = 120_000  # milliseconds
MOVES = {  # control: what must change when it is moved
    "step": ("#step-said", "#denoised"),
    "block": ("#block-shape", "#block-kinds"),
    "map-site": ("#map-said", "#map-asked"),
    "map-step": ("#map-said", "#map-asked"),
    "map-frame": ("#map-said", "#map-asks", "#map-strip", "#map-time"),
    "map-row": ("#map-said", "#map-asks", "#map-asked"),
    "map-column": ("#map-said", "#map-asks", "#map-asked"),
    "build-frame": ("#build-said", "#build-0", "#off-2"),
    "amplify": ("#build-said", "#off-2"),
    "query": ("#query-said", "#said-two", "#out-two"),
    "strength": ("#query-said", "#said-two", "#out-two"),
    "second": ("#query-said", "#said-two", "#out-two"),
    "cut": ("#cut-said", "#ledger"),
    "cost-build": ("#cut-said",),
    "cost-model": ("#ledger", "#cut-said"),
}
LOOKS = """element => element instanceof HTMLCanvasElement ? element.toDataURL() : element.src || element.innerHTML"""
NAMELESS = """() => [...document.querySelectorAll('input, select, button, canvas, img, svg[role=img], [tabindex]')]
  .filter(e => !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.getAttribute('alt')
    && !e.textContent.trim() && !e.querySelector('title')).map(e => e.id || e.tagName)"""
TOO_WIDE = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll')
  && e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.id || e.tagName)"""
CONTRAST = """() => {
  const light = c => c.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const ground = light(rgb(getComputedStyle(document.body).backgroundColor));
  return Math.min(...[...document.querySelectorAll('p, h1, h2, h3, label, td, th, a, figcaption, li')].map(e => {
    const ink = light(rgb(getComputedStyle(e).color));
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  }));
}"""


def found_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def checks(page: Any) -> Iterator[tuple[str, bool]]:
    """Each check of an open page, and whether it holds."""
    page.wait_for_selector("body[data-ready=yes]", timeout=PATIENCE)
    yield "every control and picture has a name", page.evaluate(NAMELESS) == []
    yield "every image has words for it", bool(page.get_attribute("#denoised", "alt"))
    for control, moved in MOVES.items():
        kind = page.eval_on_selector(f"#{control}", "element => element.tagName")
        before = [page.eval_on_selector(place, LOOKS) for place in moved]
        page.focus(f"#{control}")
        if kind == "SELECT":
            values = page.eval_on_selector_all(f"#{control} option", "options => options.map(o => o.value)")
            value = page.input_value(f"#{control}")
            page.select_option(f"#{control}", values[(values.index(value) + 1) % len(values)])
        else:
            low = page.input_value(f"#{control}") == page.get_attribute(f"#{control}", "max")
            page.keyboard.press("ArrowLeft" if low else "ArrowRight")
        after = [page.eval_on_selector(place, LOOKS) for place in moved]
        for place, was, now in zip(moved, before, after, strict=True):
            yield f"{control} moves {place}", was != now
    yield "the output over one key never moved", "place: 0, to the bit" in page.inner_text("#said-one")
    yield "that over two did", "place: 0, to the bit" not in page.inner_text("#said-two")
    page.fill("#second", "0")
    still = page.inner_text("#said-two").split("place: ")[1]
    yield "over two equal keys it does not", still.startswith("0, to the bit") or float(still.rstrip(".")) < 1e-9

    box = page.locator("#map-asks")
    box.scroll_into_view_if_needed()
    size = box.bounding_box()
    said = page.inner_text("#map-said")
    page.mouse.move(size["x"] + 2, size["y"] + 2)
    first = page.inner_text("#map-said")
    yield "the pointer chooses a place", "row 1, column 1." in first and first != said
    page.mouse.move(size["x"] + size["width"] - 2, size["y"] + size["height"] - 2)
    yield "and another", page.inner_text("#map-said") != first
    size = page.locator("#map-strip").bounding_box()
    page.mouse.move(size["x"] + size["width"] - 2, size["y"] + 2)
    last = page.get_attribute("#map-frame", "max")
    yield "over all frames, a frame as well", f"frame {last}, row 1, column " in page.inner_text("#map-said")

    blocks = page.locator("#u .block")
    for i in (0, blocks.count() - 1):
        blocks.nth(i).hover()
        name = blocks.nth(i).get_attribute("aria-label").split(":")[0]
        yield f"the pointer over {name} shows it", page.inner_text("#block-shape").startswith(name)
    blocks.nth(1).click()
    was = page.inner_text("#block-shape")
    page.keyboard.press("ArrowRight")
    yield "an arrow key goes to the next block", page.inner_text("#block-shape") != was
    yield "one block is a tab stop", page.locator("#u .block[tabindex='0']").count() == 1

    frame = page.input_value("#build-frame")
    page.click("#play")
    page.wait_for_function(f"document.getElementById('build-frame').value !== '{frame}'", timeout=PATIENCE)
    yield "the video plays", page.inner_text("#play") == "Stop"
    page.click("#play")
    frame = page.input_value("#build-frame")
    page.wait_for_timeout(600)
    yield "and stops", page.input_value("#build-frame") == frame


def browse(path: Path, shots: Path | None = None) -> list[tuple[str, bool]]:
    """All checks, in light and in dark. Raises ImportError without playwright, FileNotFoundError without a browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ImportError("a page is tried by playwright: pip install playwright") from error
    browser = found_browser()
    if browser is None:
        raise FileNotFoundError(f"no browser is on the path; need one of {', '.join(BROWSERS)}")
    found: list[tuple[str, bool]] = []
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=browser, args=QUIET, timeout=PATIENCE)
        for scheme in ("light", "dark"):
            page = opened.new_context(color_scheme=scheme, viewport={"width": 1180, "height": 900}).new_page()
            page.set_default_timeout(PATIENCE)
            stem = None if shots is None else shots / f"{path.stem}-{scheme}"
            found += [(f"{scheme}: {name}", holds) for name, holds in looked_at(page, path, stem)]
        opened.close()
    return found


def looked_at(page: Any, path: Path, stem: Path | None) -> Iterator[tuple[str, bool]]:
    """Open `path` in an empty page: all checks, in a wide window and in a narrow one; `stem` begins their pictures."""
    complaints = []

    def asked(request: Any) -> None:
        if request.url[:5] not in ("data:", "file:", "blob:"):
            complaints.append(request.url)

    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text))
    page.on("request", asked)
    page.goto(path.resolve().as_uri())
    yield from checks(page)
    contrast = page.evaluate(CONTRAST)
    yield f"text has a contrast of {contrast:.1f} to its ground, 4.5 or more", contrast >= 4.5
    for name, size in (("", {"width": 1180, "height": 900}), ("-narrow", {"width": 400, "height": 800})):
        page.set_viewport_size(size)
        wide = page.evaluate(TOO_WIDE)
        yield f"nothing is wider than {size['width']} pixels {wide or ''}", not wide
        if stem is not None:
            page.screenshot(path=f"{stem}{name}.png", full_page=True)
    yield f"no complaint and no request {complaints or ''}", not complaints


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.teach.browse", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("page", type=Path, metavar="PAGE")
    parser.add_argument("--shots", type=Path, metavar="FOLDER", help="where pictures of the page go (default: nowhere)")
    args = parser.parse_args(argv)
    found = browse(args.page, args.shots)
    for name, holds in found:
        print("holds" if holds else "FAILS", name)
    return sum(not holds for _, holds in found)


if __name__ == "__main__":
    sys.exit(main())
