"""A status page in a browser, and what can be seen, heard and measured of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.servers import until

LIVE = "#link[data-state=live]"

# The colours of all text that can be seen, with what is behind it: [[text, size in px, colour, background], ...].
# A gradient counts with each of its colours.
_COLOURS = """() => {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    probe.clearRect(0, 0, 1, 1);
    probe.fillStyle = colour;
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      const stops = style.backgroundImage.match(/(rgba?|color|oklch|lab)\\([^()]*\\)/g);
      if (stops) return stops.map(rgb).filter((colour) => colour[3] > 0);
      const found = rgb(style.backgroundColor);
      if (found[3] === 255) return [found];
    }
    return [[255, 255, 255, 255]];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim();
    const element = walk.currentNode.parentElement;
    if (!text || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    for (const background of behind(element)) {
      found.push([text.slice(0, 40), element.className, rgb(style.color), background]);
    }
  }
  return found;
}"""

_FOCUS = """() => {
  const at = document.activeElement;
  if (!at || at === document.body) return null;
  const style = getComputedStyle(at);
  const box = at.getBoundingClientRect();
  return { tag: at.tagName, id: at.id, text: (at.textContent || at.placeholder || "").trim().slice(0, 60),
    within: at.closest("section")?.id ?? "",
    outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
    seen: box.width > 0 && box.height > 0 && box.left >= -1 };
}"""


class View:
    """A browser's page. Notes every request, and everything that the browser complains of."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: line.type in ("error", "warning") and self.complaints.append(line.text))

    def reset(self) -> None:
        """As it was when it was new."""
        self.page.unroute_all()
        self.context.set_offline(False)
        self.page.goto("about:blank")
        self.page.set_viewport_size({"width": 1280, "height": 900})
        self.page.emulate_media(color_scheme="light", reduced_motion="no-preference")
        self.requests.clear()
        self.complaints.clear()

    def open(self, url: str, live: bool = True) -> None:
        """Go there; ``live``: and wait until it shows what there is."""
        self.page.goto(url)
        if live:
            self.page.wait_for_selector(LIVE, timeout=30_000)

    def until(self, script: str, what: str, deadline: float = 30.0) -> Any:
        """Wait until an expression in the page is true; returns its value."""
        return self._until(lambda: self.page.evaluate(script), what, deadline)

    def text(self, selector: str) -> str:
        """All text below it that can be seen."""
        found: str = self.page.inner_text(selector)
        return found

    def shows(self, selector: str, words: str) -> None:
        """Wait until the text below it has these words."""
        self._until(lambda: words in self.text(selector), f"{selector} shows {words!r}")

    def _until(self, condition: Callable[[], Any], what: str, deadline: float = 30.0) -> Any:
        def looked() -> Any:
            # Asked without a pause, the browser would do nothing else.
            return condition() or self.page.wait_for_timeout(25)

        return until(looked, what, deadline)

    def stage(self, stage_id: str) -> str:
        return f"#s-{stage_id}"

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        found: int = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        return max(0, found)

    def low_contrast(self, least: float = 4.5) -> list[tuple[float, str, str]]:
        """Texts whose contrast with what is behind them is lower, by WCAG 2's formula."""
        found = [
            (contrast(tuple(colour), tuple(background)), text, kind)
            for text, kind, colour, background in self.page.evaluate(_COLOURS)
        ]
        assert found, "there is text to look at"
        return sorted({(round(ratio, 2), text, kind) for ratio, text, kind in found if ratio < least})

    def focused(self) -> dict[str, Any] | None:
        """What has the focus; None: nothing of the page."""
        found: dict[str, Any] | None = self.page.evaluate(_FOCUS)
        return found


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """WCAG 2: the ratio of two colours' relative luminances, each 0.05 brighter."""

    def luminance(colour: tuple[int, ...]) -> float:
        linear = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in (part / 255 for part in colour[:3])
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
