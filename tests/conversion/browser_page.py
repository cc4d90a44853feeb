"""The page that `sam-split export --page` writes, in a headless Chromium. `nox -s page` runs it."""

import functools
import http.server
import json
import os
import runpy
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from skimage import data
from trained_adapters import trained

from conversion import convert
from conversion.cli import main
from conversion.cli.demo import TINY_SAM
from conversion.cli.demo_figure import COINS
from sam_split import SamSplitModel

MODULES = Path(os.environ["NODE_MODULES"])
CDN = "https://cdn.jsdelivr.net/npm/"
POINT = COINS.point
SIDE = 128
PATIENCE = 300_000  # ms; how long something may take on a busy machine


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    convert(TINY_SAM, folder / "split", progress=False)
    model = SamSplitModel.from_pretrained(folder / "split")
    trained(model, folder / "run" / "adapter", r=8, target_modules=r"vision_encoder.*\.(q|k|v|proj|lin1|lin2)")
    adapter = "--adapter", str(folder / "run" / "adapter")
    assert main(["export", str(folder / "split"), str(folder / "out"), *adapter, "--page", "--quiet"]) == 0
    Image.fromarray(COINS.image()).save(folder / "coins.png")
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(exported):
    handler = functools.partial(Quiet, directory=exported / "out")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A tab whose every request is answered by the folder or by the packages' own files; it fails on any other."""
    strangers = []

    def answer(route):
        url = route.request.url
        if url.startswith((address, "blob:", "data:")):
            return route.continue_()
        package, _, rest = url.removeprefix(CDN).lstrip("@").partition("@")
        file = MODULES / ("@" + package if url.startswith(CDN + "@") else package) / rest.partition("/")[2]
        if url.startswith(CDN) and file.is_file():
            return route.fulfill(path=file, headers={"Access-Control-Allow-Origin": "*"})
        strangers.append(url)
        return route.abort()

    context = browser.new_context(viewport={"width": 900, "height": 1150}, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    context.route("**/*", answer)
    yield context.new_page()
    context.close()
    assert strangers == []


def opened(page, address, exported):
    page.goto(address)
    page.set_input_files("#file", exported / "coins.png")
    return ready(page, "Click on an object")


def ready(page, words):
    """The status once the page is not busy; it must hold these words."""
    page.wait_for_selector("body:not([aria-busy])", timeout=PATIENCE)
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator("#status")).to_contain_text(words)
    return page.locator("#status").inner_text()


def place(x, y, page):
    """A pixel of the image on the screen."""
    box = page.locator("#canvas").bounding_box()
    return box["x"] + (x + 0.5) / SIDE * box["width"], box["y"] + (y + 0.5) / SIDE * box["height"]


def saved_mask(page):
    with page.expect_download() as download:
        page.get_by_role("button", name="Save mask as PNG").click()
    mask = np.asarray(Image.open(download.value.path()).convert("L"))
    assert mask.shape == (SIDE, SIDE)
    assert set(np.unique(mask)) == {0, 255}
    return mask > 0


def dropped(page, path):
    """Drag a file over the page and drop it there."""
    make = """([bytes, name]) => {
        const transfer = new DataTransfer();
        if (name) transfer.items.add(new File([Uint8Array.from(bytes)], name, { type: "image/png" }));
        return transfer;
    }"""
    nothing, file = (page.evaluate_handle(make, it) for it in ([[], ""], [list(path.read_bytes()), path.name]))
    page.dispatch_event("#stage", "dragover", {"dataTransfer": nothing})  # until it is dropped, a file stays hidden
    assert "over" in page.locator("#stage").get_attribute("class").split()
    page.dispatch_event("#stage", "drop", {"dataTransfer": file})
    assert "over" not in page.locator("#stage").get_attribute("class").split()


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def the_coin():
    coins = runpy.run_path("examples/coins.py")["coin_masks"](data.coins())[COINS.crop]
    assert coins.shape == (SIDE, SIDE)
    number = coins[POINT[1], POINT[0]]
    assert number
    return coins == number


def test_the_adapters_own_graphs_alone_are_stored_twice(exported):
    stored = {path.relative_to(exported / "out").as_posix() for path in (exported / "out" / "base").rglob("*.*")}
    assert stored == {"base/onnx/vision_encoder.onnx"}
    page = json.loads((exported / "out" / "page.json").read_text())
    assert page == {"adapter": "run/adapter", "base_files": ["onnx/vision_encoder.onnx"]}


def test_a_click_finds_the_coin_and_the_adapter_changes_it(page, address, exported):
    fetched = []
    page.on("request", lambda request: fetched.append(request.url.removeprefix(address)))
    opened(page, address, exported)
    page.get_by_role("radio", name="Base").check(force=True)
    ready(page, "Click on an object")
    page.mouse.click(*place(*POINT, page))
    assert " ms" in ready(page, "Base: score")
    base = saved_mask(page)
    assert iou(base, the_coin()) > 0.8
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "page.png", full_page=True)
    page.get_by_role("radio", name="Adapter").check(force=True)
    ready(page, "Adapter: score")
    assert (saved_mask(page) != base).sum() > 20
    page.get_by_role("radio", name="Base").check(force=True)
    ready(page, "Base: score")
    assert (saved_mask(page) == base).all()
    decoder, encoder = "onnx/prompt_encoder_mask_decoder.onnx", "onnx/vision_encoder.onnx"
    # transformers.js looks up the sizes of OUT's own graphs, and then fetches each graph once.
    assert sorted(url for url in fetched if ".onnx" in url) == [f"base/{encoder}", *2 * [decoder], *2 * [encoder]]


def test_a_click_with_shift_is_background(page, address, exported):
    opened(page, address, exported)
    page.get_by_role("radio", name="Base").check(force=True)
    ready(page, "Click on an object")
    page.mouse.click(*place(*POINT, page))
    ready(page, "Base: score")
    coin = saved_mask(page)
    page.keyboard.down("Shift")
    page.mouse.click(*place(115, 64, page))
    page.keyboard.up("Shift")
    ready(page, "Base: score")
    less = saved_mask(page)
    assert (less != coin).any()
    assert not less[64, 115]
    page.get_by_role("button", name="Undo").click()
    ready(page, "Base: score")
    assert (saved_mask(page) == coin).all()


def test_a_file_is_dropped(page, address, exported):
    page.goto(address)
    ready(page, "Ready, on the processor (WASM)")
    dropped(page, exported / "coins.png")
    ready(page, "Click on an object")
    page.mouse.click(*place(*POINT, page))
    ready(page, "Adapter: score")


def test_a_box_finds_the_coin(page, address, exported):
    opened(page, address, exported)
    page.get_by_role("radio", name="Base").check(force=True)
    x, y, right, bottom = COINS.box
    page.mouse.move(*place(x, y, page))
    page.mouse.down()
    page.mouse.move(*place(right, bottom, page), steps=4)
    page.mouse.up()
    ready(page, "Base: score")
    assert iou(saved_mask(page), the_coin()) > 0.8


def test_the_keys_do_what_the_mouse_does(page, address, exported):
    opened(page, address, exported)
    page.get_by_role("radio", name="Base").check(force=True)
    page.locator("#canvas").focus()
    page.keyboard.press("Enter")  # the cross begins in the middle: pixel 64, on the coin
    ready(page, "Base: score")
    one = saved_mask(page)
    assert iou(one, the_coin()) > 0.8
    page.locator("#canvas").focus()
    for _ in range(4):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+Enter")
    ready(page, "Base: score")
    assert (saved_mask(page) != one).any()
    page.locator("#canvas").focus()
    page.keyboard.press("Backspace")
    ready(page, "Base: score")
    assert (saved_mask(page) == one).all()
    page.locator("#canvas").focus()
    page.keyboard.press("Escape")
    ready(page, "Click on an object")
    expect(page.get_by_role("button", name="Save mask as PNG")).to_be_disabled()


def test_the_example_opens(page, address):
    page.goto(address)
    page.get_by_role("button", name="Take the example").click()
    ready(page, "Click on an object")
    assert page.locator("#canvas").is_visible()


def test_everything_finds_several_coins(page, address, exported):
    opened(page, address, exported)
    page.get_by_role("radio", name="Base").check(force=True)
    page.get_by_role("button", name="Everything").click()
    assert int(ready(page, " masks, ").split()[0]) > 3
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "everything.png", full_page=True)


def test_a_file_that_is_no_image_is_said_in_words(page, address, exported, tmp_path):
    (tmp_path / "photo.png").write_text("no image")
    page.goto(address)
    page.set_input_files("#file", tmp_path / "photo.png")
    expect(page.get_by_role("alert")).to_contain_text("The image could not be opened: ", timeout=PATIENCE)


def test_a_changed_library_is_refused_in_words(page, address):
    library = "**/transformers.min.js"
    changed = (MODULES / "@huggingface/transformers/dist/transformers.min.js").read_bytes() + b"\n"
    headers = {"Access-Control-Allow-Origin": "*", "Content-Type": "text/javascript"}
    page.route(library, lambda route: route.fulfill(body=changed, headers=headers))
    page.goto(address)
    expect(page.get_by_role("alert")).to_contain_text("The model could not be loaded", timeout=PATIENCE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(scheme, page, address, exported):
    page.emulate_media(color_scheme=scheme)
    opened(page, address, exported)
    page.mouse.click(*place(*POINT, page))
    ready(page, "Adapter: score")
    page.locator("summary").click()
    page.evaluate((MODULES / "axe-core" / "axe.min.js").read_text())
    faults = page.evaluate("axe.run()")["violations"]
    assert [(fault["id"], fault["impact"], fault["nodes"][0]["html"]) for fault in faults] == []
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{scheme}.png", full_page=True)
