"""Someone at a page of studies/, in a real browser."""

import json
from pathlib import Path


class Reader:
    """Someone at the page, with a mouse and a keyboard."""

    def __init__(self, chrome, path: Path) -> None:
        self.chrome, self.url = chrome, path.resolve().as_uri()
        self.open("")

    def open(self, hash: str) -> None:
        """The page anew, at this place."""
        self.chrome.get("about:blank")
        self.chrome.get(self.url + "#" + hash)
        self.wait("D && document.querySelector('section')")

    def go(self, name: str) -> None:
        """To a subcomponent, by the address."""
        self.chrome.get(self.url + "#" + name)
        self.opened(name)

    def js(self, expression: str):
        return self.chrome.execute_script(f"return {expression}")

    def wait(self, expression: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.chrome, 20, 0.05).until(lambda _: self.js(expression), f"never: {expression}")

    def find(self, css: str):
        return self.chrome.find_element("css selector", css)

    def press(self, keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.chrome).send_keys(keys).perform()

    def opened(self, name: str) -> None:
        self.wait(f"document.querySelector('h1').textContent === {json.dumps(name)}")

    @property
    def text(self) -> str:
        return self.js("document.getElementById('main').textContent")

    def quiet(self) -> None:
        """No message in the console, no request but for the file, no markup out of a token."""
        assert self.chrome.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        asked = {r["request"]["url"].partition("#")[0] for r in sent if not r["documentURL"].startswith("chrome")}
        assert asked <= {self.url, "about:blank"}  # the browser's own start page aside
        assert self.js("performance.getEntriesByType('resource').length") == 0
        assert self.js("document.querySelectorAll('img, iframe, link, main script').length") == 0
