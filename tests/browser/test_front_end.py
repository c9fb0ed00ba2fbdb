"""The host's own front end in a headless Chromium: our workflows open without a word, and queue what the tools queue."""

import json
import shutil

import pytest

from devtools.environment import ROOT
from devtools.workflow import load, to_prompt

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))

OPEN = """async workflow => {
    await window.app.loadGraphData(workflow);
    await new Promise(done => setTimeout(done, 500));
    const { output } = await window.app.graphToPrompt();
    const plain = node => ({ class_type: node.class_type, inputs: node.inputs });
    return Object.fromEntries(Object.entries(output).map(([id, node]) => [id, plain(node)]));
}"""


@pytest.fixture(scope="module")
def page(server):
    server.post("/settings", {"Comfy.TutorialCompleted": True})  # no template dialog, as on a first start
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(server.url)
        ready = "() => Boolean(window.app?.graph && window.LiteGraph?.registered_node_types.FastFinetune)"
        page.wait_for_function(ready, timeout=180_000)
        yield page
        browser.close()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens_without_warnings(path, page, object_info):
    complaints = []

    def listen(message):
        # The front end asks the internet for releases and the server for optional files; neither is the workflow's.
        if message.type in ("warning", "error") and not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    page.on("console", listen)
    workflow = load(path)
    queued = page.evaluate(OPEN, workflow)
    page.remove_listener("console", listen)
    assert complaints == []
    assert page.locator(".p-toast-message, .p-dialog").all_inner_texts() == []
    assert queued == json.loads(json.dumps(to_prompt(workflow, object_info)))
