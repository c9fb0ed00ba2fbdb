"""The host's own front end in a headless Chromium: what somebody does who opens it, from the search to the second picture."""

import io
import json
import os
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from devtools import thumbnails
from devtools.comfy_server import KEEP_RESULTS, ComfyServer
from devtools.environment import PACK, ROOT
from devtools.workflow import load, to_prompt
from hdb_core import card
from hdb_core.basis import BasisRecipe
from hdb_core.files import lidb as lidb_file
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import nobody

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REQUIRED = "HDB_BROWSER" in os.environ  # where the tests are to say whether all is well
pytestmark = pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="no Chromium on the PATH")
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
PHOTO = ROOT / "example_workflows" / "input" / "hdb_person_2.png"
TEMPLATE = "02 photo to person with HyperNet"
COMPLAINTS = ".p-toast-message, .p-dialog"
MISSING_FILES = "[data-testid=error-overlay]"  # of newer front ends

READY = "() => Boolean(window.app?.graph && window.LiteGraph?.registered_node_types.FastFinetune)"
PATIENCE = 240_000  # milliseconds, on a machine that does other things

OPEN = """async workflow => {
    await window.app.loadGraphData(workflow);
    await new Promise(done => setTimeout(done, 500));
    const { output } = await window.app.graphToPrompt();
    const plain = node => ({ class_type: node.class_type, inputs: node.inputs });
    return Object.fromEntries(Object.entries(output).map(([id, node]) => [id, plain(node)]));
}"""
IN_VIEW = """() => {
    const { scale, offset } = window.app.canvas.ds;
    const width = window.innerWidth / scale, height = window.innerHeight / scale;
    const seen = group => group.pos[0] + offset[0] >= 0 && group.pos[1] + offset[1] >= 0
        && group.pos[0] + group.size[0] + offset[0] <= width && group.pos[1] + group.size[1] + offset[1] <= height;
    return { scale, groups: window.app.graph._groups.map(group => [group.title, seen(group)]) };
}"""
NODE = "const node = kind => window.app.graph._nodes.find(one => one.type === kind);"
WATCH = """() => {
    window.seen = { progress: [], interrupted: 0, errors: [], finished: 0 };
    const listen = (kind, act) => window.app.api.addEventListener(kind, event => act(event.detail));
    listen("progress", detail => window.seen.progress.push(detail));
    listen("execution_interrupted", () => window.seen.interrupted++);
    listen("execution_error", detail => window.seen.errors.push(detail.exception_message));
    listen("execution_success", () => window.seen.finished++);
}"""

# Widgets of nodes by their type; the canvas has no element for them.
SET = """changes => {
    for (const node of window.app.graph.nodes)
        for (const [name, value] of Object.entries(changes[node.type] ?? {}))
            node.widgets.find(widget => widget.name === name).value = value;
}"""

UPLOAD = f"""() => {{
    {NODE}
    const of = node("LoadImage"), button = of.widgets.find(one => one.name === "upload");
    const {{ scale, offset }} = window.app.canvas.ds, {{ left, top }} = window.app.canvas.canvas.getBoundingClientRect();
    const x = of.pos[0] + of.size[0] / 2, y = of.pos[1] + button.last_y + 10;
    return [left + (x + offset[0]) * scale, top + (y + offset[1]) * scale];
}}"""
SAID_BY_NODES = """() => [...document.querySelectorAll(".break-all span")].map(one => one.innerText)"""
BROKEN_WORDS = r"""() => [...document.querySelectorAll(".break-all span")].flatMap(span => {
    const broken = [], walker = document.createTreeWalker(span, NodeFilter.SHOW_TEXT);
    while (walker.nextNode())
        for (const word of walker.currentNode.data.matchAll(/\S+/g)) {
            const range = document.createRange();
            range.setStart(walker.currentNode, word.index);
            range.setEnd(walker.currentNode, word.index + word[0].length);
            if (range.getClientRects().length > 1) broken.push(word[0]);
        }
    return broken;
})"""


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "HDB_BROWSER asks for these tests, and there is no Chromium on the PATH"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, server):
    """A server's front end, ready."""
    shutil.copytree(ROOT / "example_workflows" / "input", server.input, dirs_exist_ok=True)
    server.post("/settings", {"Comfy.TutorialCompleted": True})  # no template dialog, as on a first start
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.set_default_timeout(PATIENCE)
    visit(page, server)
    yield page
    page.close()


def visit(page, server):
    """Opens the front end, or opens it again."""
    page.goto(server.url)
    page.wait_for_function(READY)
    page.evaluate(WATCH)


@pytest.fixture(scope="module")
def page(browser, server):
    with opened(browser, server) as page:
        yield page


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
    assert page.locator(COMPLAINTS).all_inner_texts() == []
    assert queued == json.loads(json.dumps(to_prompt(workflow, object_info)))
    if path.stem in thumbnails.WORKFLOWS:  # whose models are here
        assert page.locator(MISSING_FILES).all_inner_texts() == []
        view = page.evaluate(IN_VIEW)
        assert view["scale"] >= 0.55 and all(seen for _, seen in view["groups"]), view


def test_a_search_finds_the_first_node(page):
    page.evaluate("() => window.app.graph.clear()")
    found = page.get_by_text("Crop to").first
    for _ in range(4):  # the canvas overlooks a double click now and then
        page.mouse.dblclick(700, 450, delay=50)
        page.keyboard.type("face", delay=30)
        with suppress(playwright.TimeoutError):
            found.wait_for(timeout=10_000)
            break
        page.keyboard.press("Escape")
    found.wait_for()
    page.keyboard.press("Escape")


def run(page, **steps):
    """Presses Run with so many steps of Fast Finetune and of KSampler."""
    page.evaluate(SET, {kind: {"steps": count} for kind, count in {"KSampler": 1, **steps}.items()})
    page.evaluate("() => { window.seen.progress = []; }")
    page.get_by_test_id("queue-button").get_by_text("Run", exact=True).click()


def press(page, x, y):
    """A click as slow as a hand's: the canvas overlooks faster ones."""
    page.mouse.move(x, y)
    for act in (page.mouse.down, page.mouse.up):
        page.wait_for_timeout(200)
        act()


def succeeded(page, times):
    page.wait_for_function("times => window.seen.finished >= times || window.seen.errors.length", arg=times)
    assert page.evaluate("() => window.seen.errors") == []


def test_from_the_template_to_the_second_picture(page, server):
    """Open, upload, run, cancel, run again, reload, and a folder that is deleted meanwhile."""
    visit(page, server)
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_text("hyperdreambooth").first.click()
    page.get_by_role("heading", name=TEMPLATE).click()
    page.wait_for_function(f"() => {{ {NODE} return Boolean(node('PredictLiDB')); }}")
    with page.expect_file_chooser() as chooser:
        press(page, *page.evaluate(UPLOAD))
    chooser.value.set_files(PHOTO)
    uploaded = f"() => {{ {NODE} return node('LoadImage').widgets[0].value; }}"
    page.wait_for_function(f"name => ({uploaded})().startsWith(name)", arg=PHOTO.stem)

    run(page, FastFinetune=2)
    succeeded(page, 1)
    ids = page.evaluate("() => window.app.graph._nodes.map(one => [one.type, String(one.id)])")
    of = {kind: number for kind, number in ids}
    reported = page.evaluate("() => window.seen.progress.map(one => [String(one.node), one.value, one.max])")
    assert [of["FastFinetune"], 2, 2] in reported and [of["KSampler"], 1, 1] in reported
    page.wait_for_function(f"() => {{ {NODE} return node('SaveImage').imgs?.length === 1; }}")
    assert len(page.evaluate(SAID_BY_NODES)) >= 3 and page.evaluate(BROKEN_WORDS) == []

    run(page, FastFinetune=500)
    page.wait_for_function("() => window.seen.progress.some(one => one.value >= 1 && one.max === 500)")
    page.get_by_role("button", name="Cancel current run").or_(page.get_by_label("Cancel current run")).first.click()
    page.wait_for_function("() => window.seen.interrupted === 1")

    run(page, FastFinetune=1)
    succeeded(page, 2)
    people = sorted((server.output / "lidb").glob("*.safetensors"))
    assert len(people) >= 2

    shutil.rmtree(server.output / "lidb")
    visit(page, server)
    page.wait_for_function(f"() => {{ {NODE} return Boolean(node('PredictLiDB')); }}")  # the graph is still there
    assert page.evaluate("() => 'LoadLiDB' in window.LiteGraph.registered_node_types")
    assert page.locator(COMPLAINTS).all_inner_texts() == []


OUT_OF_GROUPS = """() => {
    const { _nodes: nodes, _groups: groups } = window.app.graph;
    const inside = ([x, y], { pos, size }) =>
        pos[0] <= x && pos[1] <= y && x <= pos[0] + size[0] && y <= pos[1] + size[1];
    return nodes.filter(node => !groups.some(group => inside(node.pos, group))).map(node => node.type);
}"""


def test_nodes_stay_in_their_groups_in_nodes_2(browser, server):
    """Where the front end fits a workflow to the window itself, it moves them."""
    with opened(browser, server) as page:
        server.post("/settings", {"Comfy.VueNodes.Enabled": True})
        try:
            visit(page, server)
            for path in WORKFLOWS:
                page.evaluate(OPEN, load(path))
                page.locator("[data-node-id]").first.wait_for()
                page.wait_for_timeout(500)
                assert page.evaluate(OUT_OF_GROUPS) == [], path.stem
        finally:
            server.post("/settings", {"Comfy.VueNodes.Enabled": False})


HARM = ("<img src=x onerror='window.harmed = 1'> & <b>Anna</b>", "[[Anna|https://example.com]] __LNK7__")
LOAD_AND_COMPARE = """name => {
    window.app.graph.clear();
    const [load, compare] = ["LoadLiDB", "CompareLiDB"].map(kind => window.LiteGraph.createNode(kind));
    [load, compare].forEach((node, place) => { node.pos = [100 + 400 * place, 200]; window.app.graph.add(node); });
    window.app.canvas.ds.reset();
    load.widgets.find(widget => widget.name === "lidb_name").value = name;
    [0, 1].forEach(place => load.connect(0, compare, place));
}"""


# Long texts are in lines, so the name may be, too.
SAID = (
    r"""name => [...document.querySelectorAll("span")].some(one => one.innerText.replace(/\s+/g, " ").includes(name))"""
)


@pytest.mark.parametrize("name", HARM)
def test_a_strangers_name_is_shown_and_not_run(browser, server, name):
    """The front end takes what a node says as HTML."""
    layout = Layout("sd1", (Layer("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 64, 64),))
    person = card.labelled(nobody(layout, BasisRecipe()), name)
    (server.output / "lidb").mkdir(parents=True, exist_ok=True)
    lidb_file.save(person, server.output / "lidb" / "stranger.safetensors")
    with opened(browser, server) as page:
        page.evaluate(LOAD_AND_COMPARE, "stranger.safetensors")
        page.get_by_test_id("queue-button").get_by_text("Run", exact=True).click()
        succeeded(page, 1)
        page.wait_for_function(SAID, arg=name)
        assert page.evaluate("() => window.harmed") is None


TINY = "tiny_z_image"


@pytest.fixture
def with_z_image(prepared_host, tmp_path):
    """A server whose folders hold the three files of the template *03 photo to person with Z-Image*, tiny and random."""
    custom_nodes = tmp_path / "base" / "custom_nodes"
    custom_nodes.mkdir(parents=True)
    for name, folder in {PACK: ROOT, TINY: Path(__file__).with_name(TINY)}.items():
        (custom_nodes / name).symlink_to(folder, target_is_directory=True)
    options = (*KEEP_RESULTS, "--whitelist-custom-nodes", PACK, TINY)
    with ComfyServer(replace(prepared_host, base=custom_nodes.parent), tmp_path / "work", options=options) as server:
        yield server


def test_a_person_on_z_image_by_the_button_run(browser, with_z_image):
    server = with_z_image
    with opened(browser, server) as page:
        page.evaluate(OPEN, load(ROOT / "example_workflows" / "03 photo to person with Z-Image.json"))
        assert page.locator(MISSING_FILES).all_inner_texts() == []
        page.evaluate(SET, {"FastFinetune": {"steps": 2}, "EmptySD3LatentImage": {"width": 256, "height": 256}})
        page.get_by_test_id("queue-button").get_by_text("Run", exact=True).click()
        entry = finished(server)
    assert entry["status"]["status_str"] == "success", entry["status"]
    (image,) = entry["outputs"]["11"]["images"]
    assert Image.open(io.BytesIO(server.fetch(image))).size == (256, 256)
    (person,) = entry["outputs"]["4"]["text"]
    with safe_open(server.output / person, "pt") as file:
        assert "ZImage" in str(file.metadata())


def finished(server, seconds: float = 300):
    """The only entry of a server's history, when it is there."""
    end = time.monotonic() + seconds
    while not (history := server.get("/history")):
        server.check_alive()
        assert time.monotonic() < end, server.log_tail()
        time.sleep(0.5)
    (entry,) = history.values()
    return entry
