"""A headless Chromium, spoken to over its debugging pipe: pages at a width and colour scheme, and what is wrong with them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60.0  # seconds for any answer

# What a reader would stumble over: text that is hard to see or cut off by the page's edge, and things without a name.
CHECK = r"""
(() => {
  const found = [];
  const colour = (text) => {
    const [r, g, b, a] = text.match(/[\d.]+/g).map(Number), unit = text.startsWith('color(') ? 255 : 1;
    return {rgb: [r * unit, g * unit, b * unit], a: a === undefined ? 1 : a};
  };
  const over = (top, below) => top.rgb.map((v, i) => v * top.a + below[i] * (1 - top.a));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(colour(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement, text = node.textContent.trim();
    if (!text || ['STYLE', 'TITLE', 'title'].includes(parent.tagName)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect(), style = getComputedStyle(parent);
    if (!box.width || !box.height || style.visibility === 'hidden') continue;
    const back = ground(parent);
    const ink = over(colour(parent.ownerSVGElement ? style.fill : style.color), back);
    const [high, low] = [light(ink), light(back)].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < (large ? 3 : 4.5)) found.push(`contrast ${ratio.toFixed(2)}: ${text.slice(0, 60)}`);
  }
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (wide > 0) found.push(`the page is ${wide} pixels wider than the window`);
  if (!document.title.trim() || !document.documentElement.lang) found.push('no title or no language');
  if (document.querySelectorAll('main').length !== 1 || document.querySelectorAll('h1').length !== 1)
    found.push('not one main and one h1');
  for (const image of document.images) if (!image.alt) found.push(`a picture without alt: ${image.outerHTML.slice(0, 60)}`);
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) found.push(`a picture that is not there: ${image.alt}`);
  for (const drawn of document.querySelectorAll('svg'))
    if (!(drawn.getAttribute('aria-label') || '').trim()) found.push('a chart without a name');
  for (const region of document.querySelectorAll('section, [role=region]'))
    if (!region.getAttribute('aria-label')) found.push('a region without a name');
  for (const reached of document.querySelectorAll('a[href], button, summary, [tabindex]'))
    if (!(reached.getAttribute('aria-label') || reached.textContent).trim())
      found.push(`no name: ${reached.outerHTML.slice(0, 60)}`);
  for (const scroller of document.querySelectorAll('.scroll'))
    if (scroller.scrollWidth > scroller.clientWidth && scroller.tabIndex < 0) found.push('a table that no key scrolls');
  let last = 0;
  for (const heading of document.querySelectorAll('h1, h2, h3, h4')) {
    const level = Number(heading.tagName[1]);
    if (level > last + 1) found.push(`h${level} below h${last}: ${heading.textContent.slice(0, 40)}`);
    last = level;
  }
  const ids = [...document.querySelectorAll('[id]')].map((one) => one.id);
  if (new Set(ids).size < ids.length) found.push('an id that is there twice');
  return found;
})()
"""


def find() -> str | None:
    """The path of a Chromium here; None without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. complaints: what the console and the network said since the last page was opened."""

    def __init__(self, to: int, answers: int):
        self._to, self._from = to, answers
        self._number, self._rest = 0, b""
        self._session: str | None = None
        self._loaded = False
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._hear(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Show a page in a window of `width` pixels, in a scheme: light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.complaints, self._loaded = [], False
        told = self.call("Page.navigate", url=page.resolve().as_uri())
        assert "errorText" not in told, f"{page}: {told['errorText']}"
        while not self._loaded:
            self._hear(self._next())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def _hear(self, message: dict[str, Any]) -> None:
        about, told = message.get("method"), message.get("params", {})
        if about == "Page.loadEventFired":
            self._loaded = True
        elif about == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif about == "Runtime.exceptionThrown":
            self.complaints.append(told["exceptionDetails"]["text"])
        elif about == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(told["args"]))
        elif about == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(f"the page asks {told['request']['url']}")

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self._from, 1 << 20)
            assert more, "the browser is gone"
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)


@contextlib.contextmanager
def started(program: str, profile: Path) -> Iterator[Browser]:
    """A browser that ends with the block. profile: a folder for its files."""
    ours, to = os.pipe()
    answers, theirs = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--disable-extensions", "--disable-background-networking", "--hide-scrollbars",
               f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]  # fmt: skip
    shell = ["bash", "-c", f'exec "$@" 3<&{ours} 4>&{theirs}', "browser", program, *options]
    process = subprocess.Popen(shell, pass_fds=(ours, theirs), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.close(ours)
    os.close(theirs)
    try:
        yield Browser(to, answers)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(answers)
