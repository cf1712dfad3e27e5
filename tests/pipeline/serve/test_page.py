"""The chat page in a real browser, driven over its own protocol: the answer is shown, the thinking never."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_replies import hostile
from fake_upstream import ANSWER, FakeUpstream, generation, no_canary, text
from running_server import RunningServer

from pipeline.serve.keys import load_api_keys, load_operators, new_api_key

InFront = Callable[..., RunningServer]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


class Browser:
    """Chromium's DevTools protocol over a pipe: JSON messages that end with NUL."""

    def __init__(self, to: int, out: int) -> None:
        self._to, self._out, self._rest, self._number, self._session = to, out, b"", 0, {}

    def open(self, url: str) -> None:
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.do("Page.enable")
        self.do("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && typeof ask === 'function'")

    def do(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._out, 65536)
            one, _, self._rest = self._rest.partition(b"\0")
            reply = json.loads(one)
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]

    def value(self, script: str) -> Any:
        return self.do("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < deadline, (script, self.value("document.body.innerText"))
            time.sleep(0.05)

    def type(self, element: str, words: str) -> None:
        self.value(f"document.getElementById('{element}').focus()")
        self.do("Input.insertText", text=words)
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.do("Input.dispatchKeyEvent", type="keyDown", **key)
        self.do("Input.dispatchKeyEvent", type="keyUp", **key)


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    # the browser speaks on its descriptors 3 and 4
    script = f'exec "$0" "$@" 3<&{in_read} 4>&{out_write}'
    process = subprocess.Popen(
        ["bash", "-c", script, str(BROWSER), *options, f"--user-data-dir={folder}/profile"],
        pass_fds=(in_read, out_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(in_read)
    os.close(out_write)
    try:
        yield Browser(in_write, out_read)
    finally:
        process.kill()
        process.wait()
        os.close(in_write)
        os.close(out_read)


def test_a_browser_sees_the_answer_and_the_operator_why_there_is_none(
    in_front: InFront, upstream: FakeUpstream, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    boss, user = new_api_key(file, "boss", operator=True), new_api_key(file, "user")
    server = in_front(keys=load_api_keys(file), operators=load_operators(file))
    markup = "<img src=x onerror=document.title='taken'>"
    with browser(tmp_path) as page:
        page.open(f"http://127.0.0.1:{server.port}/")
        page.until("document.getElementById('model').textContent === 'give a key'")
        page.type("key", user)
        page.until("document.getElementById('model').textContent === 'm'")
        page.type("text", "what is it?")
        page.until(f"document.querySelector('.assistant')?.textContent === {json.dumps(ANSWER)}")
        upstream.script = lambda _: generation(text(answer=markup))
        page.type("text", "and now?")
        page.until(f"document.querySelectorAll('.assistant')[1]?.textContent === {json.dumps(markup)}")
        assert page.value("document.querySelector('main img')") is None
        assert page.value("document.title") == "so8t"
        assert upstream.requests[-1][1]["messages"][-2]["content"] == ANSWER  # the history goes along
        upstream.script = lambda _: hostile()["answer copies"]
        page.type("text", "and again?")
        page.until("document.querySelector('.withheld')?.textContent.startsWith('Withheld')")
        assert page.value("document.getElementById('operator').hidden") is True
        assert "copied run" not in page.value("document.documentElement.outerHTML")
        page.value("document.getElementById('key').value = ''")
        page.type("key", boss)
        page.until("document.getElementById('decisions').innerText.includes('copied run')")
        no_canary(page.value("document.documentElement.outerHTML").encode())
        inject = "const s = document.createElement('script'); s.textContent = \"document.title = 'taken'\";"
        page.value(f"(() => {{ {inject} document.body.append(s) }})()")
        assert page.value("document.title") == "so8t"  # the page's own policy lets no other script run
