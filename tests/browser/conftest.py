"""Fixtures: a browser, a server over a store, and pages that fail the test on any browser error."""

import os
import threading
from pathlib import Path

import pytest

from ray_detox.store.sqlite import SQLiteStore
from ray_detox.viewer.server import make_server
from tests.browser.runs import HISTORY, make_report, make_samples

CHROMIUM = os.environ.get("RAY_DETOX_CHROMIUM", "/usr/bin/chromium")
if not Path(CHROMIUM).is_file():
    pytest.skip(
        "Chromium is not installed; scripts/test_tools.sh fetches it", allow_module_level=True
    )

from playwright.sync_api import sync_playwright  # noqa: E402


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A store with three runs; the second has other responses to all but one of the same prompts."""
    store = SQLiteStore(tmp_path_factory.mktemp("results") / "results.sqlite")
    samples = make_samples(60)
    store.put_run(make_report("first", samples), samples, HISTORY)
    others = [
        sample | {"response_after": f"Other response {sample['index']}.", "toxicity_after": 0.1}
        for sample in samples
    ]
    others[59]["prompt_id"] = "another prompt"
    report = make_report("second", others, created="2026-01-30T12:00:00+00:00")
    store.put_run(report, others, HISTORY)
    store.put_run(make_report("empty", [], created="2026-01-29T12:00:00+00:00"), [])
    return store


@pytest.fixture(scope="session")
def serve():
    """Serve a store, and return the address of its page."""
    servers = []

    def start(store):
        server = make_server(store)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.address

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def address(serve, store):
    return serve(store)


@pytest.fixture(scope="package")
def browser():
    """One browser for this folder. It ends with the last test here, because even idle it needs CPU."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open an address; fails at teardown if a page logged an error or violated its policy."""
    contexts, problems = [], []

    def open_(address, *, allowed=(), **settings):
        context = browser.new_context(
            viewport=settings.pop("viewport", {"width": 1280, "height": 900}), **settings
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)

        def note(text):
            if not any(words in text for words in allowed):
                problems.append(text)

        page.on("pageerror", lambda error: note(str(error)))
        page.on("console", lambda m: note(m.text) if m.type in ("error", "warning") else None)
        page.on("dialog", lambda dialog: (note(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(address)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []
