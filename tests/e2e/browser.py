"""A real browser, driven by the few words of the DevTools protocol that the tests of pages need."""

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import websocket
from services import Missing

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--remote-debugging-port=0",
)  # fmt: skip
WAIT = 120.0  # seconds
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "ArrowLeft": (37, ""), "ArrowRight": (39, ""), " ": (32, " ")}

WIDTHS = (390, 800, 1280)
# What reaches over the right edge, or is cut off by its own box; the handle of a slider may stand over its picture.
TOO_WIDE = """[...document.querySelectorAll("body *")].filter((part) => {
  if (part.closest("svg") && part.tagName !== "svg" || part.tagName === "INPUT") return false;
  const { left, right, width } = part.getBoundingClientRect();
  const cut = part.matches(".scroll, td, th, dd, dt, figcaption, label, .fact, .finding, .warning, .legend")
    && part.clientWidth > 0 && part.scrollWidth > part.clientWidth + 1;
  return width > 0 && (right > innerWidth + 0.5 || left < -0.5 || cut);
}).map((part) => part.outerHTML.slice(0, 120))"""
# The words of a drawing that its frame cuts off.
CUT_WORDS = """[...document.querySelectorAll("svg text")].filter((word) => {
  const inner = word.getBoundingClientRect(), outer = word.closest("svg").getBoundingClientRect();
  return inner.width > 0 && (inner.left < outer.left - 1 || inner.right > outer.right + 1);
}).map((word) => word.textContent)"""


class Browser:
    """Chromium without a window, with one page; what the page says on its console or asks the network for is kept."""

    def __init__(self, profile: Path) -> None:
        self.profile = profile
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def start(self) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            raise Missing("no browser: install Debian's chromium (tests/e2e/install does, for root)")
        command = [program, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        announced, until = self.profile / "DevToolsActivePort", time.monotonic() + WAIT
        while not (announced.exists() and announced.read_text().count("\n")):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{program} did not start")
            time.sleep(0.1)
        port, path = announced.read_text().split()
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=WAIT, suppress_origin=True)
        self.sent, self.session = 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def stop(self) -> None:
        if hasattr(self, "socket"):
            self.socket.close()
        if hasattr(self, "process"):
            self.process.terminate()
            self.process.wait(30)

    def call(self, method: str, **parameters: Any) -> Any:
        """What the browser answers; on the way it hears of events."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := self._receive()).get("id") != self.sent:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.socket.recv())
        event, facts = message.get("method"), message.get("params", {})
        if event in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(facts))
        if event == "Network.requestWillBeSent" and not facts["request"]["url"].startswith(
            ("data:", "file:", "about:")
        ):
            self.requests.append(facts["request"]["url"])
        return message

    def open(self, page: Path, *, width: int, scheme: str = "light", height: int = 900) -> None:
        """Shows a file at a width in pixels, in the light or the dark scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key, to whatever has the focus."""
        code, text = KEYS[key]
        facts = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def screenshot(self, file: Path, *, whole: bool = True, top: int = 0, bottom: int | None = None) -> None:
        """The page as PNG, or a stripe of it."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        end = bottom or size["height"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": end - top, "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip} if whole else {}
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))

    def print(self, file: Path) -> None:
        """The page as it goes to paper."""
        pdf = self.call("Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.69)["data"]
        file.write_bytes(base64.b64decode(pdf))
