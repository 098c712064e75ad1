"""The chat page in a browser: it answers, stops, remembers, and asks nobody but its own server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.plugins.browser import opened_page, program
from tests.plugins.serve.conftest import Running, running_server

FOLDER = Path(__file__).parents[3] / "apt_plugins" / "serve"


def test_the_page_has_a_strict_policy_and_names_nobody_else(server: Running) -> None:
    status, html, headers = server.ask("/")
    policy = headers["content-security-policy"]
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    texts = [html.decode()]
    for name, kind in (("chat.css", "text/css"), ("chat.js", "text/javascript")):
        status, content, headers = server.ask(f"/{name}")
        assert status == 200 and headers["content-type"] == f"{kind}; charset=utf-8"
        texts.append(content.decode())
    page, style, script = texts
    assert not any(re.search(r"https?://|//\w+\.", text) for text in (page, style, script))
    assert not re.search(r"<script(?![^>]*src=)|<style|style=|\son\w+=", page)
    assert "innerHTML" not in script and "prefers-color-scheme: dark" in style


@pytest.mark.skipif(program() is None, reason="no Chromium is installed")
def test_a_conversation_in_a_browser(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="the browser is driven by its WebSocket")
    markup = "<b id=bold>x</b> 字 🙂"
    with running_server(key="sesame-1") as server, opened_page(server.url, tmp_path) as page:
        page.until("!document.getElementById('key-field').hidden")
        page.js("document.getElementById('key').focus()")
        page.type("sesame-1")
        page.press("Tab")
        page.until("document.getElementById('model').textContent === 'tiny'")
        page.js("document.getElementById('text').focus()")
        answers = (
            "[...document.querySelectorAll('.assistant p:first-child')].map(p => p.textContent)"
        )
        free = "!document.getElementById('send').hidden"
        page.type(f"say {markup}")
        page.press("Enter")
        page.until(f"{free} && {answers}.length === 1")
        assert page.js(answers) == [markup] and page.js("!document.getElementById('bold')")
        # A stream is shown while it comes, and ends with the key.
        page.type("wait")
        page.press("Enter")
        server.turns.release(3)
        page.until(f"{answers}[1] === 'www'")
        assert page.js("document.getElementById('send').hidden")
        page.press("Escape")
        page.until(free)
        server.drain()
        assert "Stopped." in page.js("document.querySelectorAll('.assistant')[1].textContent")
        # What is not valid is told, and the message goes back to where it was written.
        page.js("document.getElementById('temperature').value = -1")
        page.type("say more")
        page.press("Enter")
        page.until("document.getElementById('status').textContent.startsWith('temperature')")
        assert page.js("document.getElementById('text').value") == "say more"
        page.js("document.getElementById('temperature').value = 0")
        page.press("Enter")
        page.until(f"{free} && {answers}.length === 3")
        assert page.js(answers)[2] == "more"
        assert all(url.startswith(server.url) for url in page.requests), page.requests
        refused = [line for line in page.complaints if "401" not in line]
        assert not refused, refused
