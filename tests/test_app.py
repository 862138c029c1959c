"""`examples/app.py` in a real browser. `make test-app` runs it; without Gradio or Chromium it is skipped."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import HUB, make_pipeline, save_adapter

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIDE = 160  # of a picture of 16 pixels on the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    pipe = make_pipeline()
    pipe.register_to_config(id2label={0: "tench", 1: "goldfish"})
    pipe.save_pretrained(folder / "base")
    save_adapter(folder / "fox", 0, id2label={0: "fox", 1: "owl"}, init_class_rows=[1, 0])
    save_adapter(folder / "art", 1, id2label={0: "owl", 1: "ink"})
    return folder


@pytest.fixture(scope="module")
def address(folder):
    command = [sys.executable, "-u", ROOT / "examples/app.py", "--pretrained_model_name_or_path", folder / "base"]
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--adapters", folder / "fox"], stdout=subprocess.PIPE, text=True, env=environment
    ) as app:
        lines = iter(app.stdout.readline, "")
        yield next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        app.terminate()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    return opened(browser, address)


def opened(browser, address):
    page = browser.new_context().new_page()
    page.goto(address)
    page.get_by_role("button", name="Draw").wait_for()
    number(page, "steps").fill("2")
    return page


def number(page, label):
    return page.get_by_role("spinbutton", name=re.compile(f"{label}$"))


def picture(page, name: str) -> np.ndarray:
    source = page.locator(f"#{name} img").get_attribute("src")
    content = page.evaluate(
        "async url => { const r = await fetch(url); const b = new Uint8Array(await r.arrayBuffer());"
        " return btoa(b.reduce((s, c) => s + String.fromCharCode(c), '')) }",
        source,
    )
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def draw(page, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """The grid of the base, of the adapters, and the code."""
    number(page, "first seed").fill(str(seed))
    page.get_by_role("button", name="Draw").click()
    page.locator("#code .cm-line", has_text=f"in range({seed}, {seed + 4})").wait_for()
    page.wait_for_function("() => !document.querySelector('.progress-text')")
    return picture(page, "base"), picture(page, "adapted"), "\n".join(page.locator("#code .cm-line").all_inner_texts())


def assert_draws(code: str, grid: np.ndarray) -> None:
    names = {}
    exec(code, names)
    for i, image in enumerate(names["images"]):
        top, left = (i // 2) * SIDE, (i % 2) * SIDE
        assert np.array_equal(np.asarray(image), grid[top : top + SIDE : 10, left : left + SIDE : 10])


def test_the_code_on_the_page_draws_the_picture_beside_it(page):
    page.get_by_role("radio", name="domain").check()
    _, adapted, code = draw(page)
    assert_draws(code, adapted)


def test_the_base_draws_the_class_that_the_new_one_started_from(page):
    base, _, code = draw(page)
    lines = [line for line in code.splitlines() if "load_difffit_weights" not in line and "set_adapters" not in line]
    assert_draws("\n".join(lines).replace("'fox'", "'goldfish'"), base)


def test_at_scale_0_the_adapter_has_no_effect(page):
    base, adapted, _ = draw(page)
    assert np.abs(base.astype(int) - adapted).max() > 20
    number(page, "fox").fill("0")
    page.get_by_role("combobox", name="class").fill("tench")
    page.get_by_role("combobox", name="class").press("Enter")
    base, adapted, code = draw(page, 7)
    assert np.array_equal(base, adapted) and "load_difffit_weights" not in code


def add(page, **given) -> None:
    page.get_by_role("button", name="Add an adapter").click()
    if "id" in given:
        page.get_by_role("textbox", name="Hub id or folder").fill(given["id"])
    else:
        page.locator("input[type=file]").set_input_files(given["files"])
        page.get_by_text(Path(given["files"][-1]).suffix).first.wait_for()
    page.get_by_role("button", name="Add", exact=True).click()


def test_an_adapter_is_added_from_the_hub(page, folder):
    from huggingface_hub import HfApi

    api = HfApi(endpoint=HUB.endpoint)
    api.create_repo("me/art")
    api.upload_folder(repo_id="me/art", folder_path=folder / "art")
    add(page, id="me/art")
    number(page, "art").wait_for()
    assert "art" in draw(page)[2]


@pytest.mark.parametrize(
    ("weights", "message"),
    [(b"\x80\x04not tensors", "safetensors"), (None, "adapter_model.safetensors")],
    ids=["not safetensors", "none"],
)
def test_a_hostile_file_is_refused_with_a_message(page, folder, tmp_path, weights, message):
    files = [tmp_path / "adapter_config.json"]
    shutil.copy(folder / "art/adapter_config.json", files[0])
    if weights is not None:
        files.append(tmp_path / "adapter_model.safetensors")
        files[-1].write_bytes(weights)
    sliders = page.get_by_role("slider").count()
    add(page, files=files)
    page.locator(".toast-body", has_text=message).wait_for()
    assert page.get_by_role("slider").count() == sliders
    draw(page)


def test_an_id_that_is_not_there_is_refused(page):
    add(page, id="me/nothing")
    page.locator(".toast-body", has_text="me/nothing").wait_for()


def test_ten_quick_clicks_and_two_browsers(browser, page, address):
    other = opened(browser, address)
    number(other, "fox").fill("0.5")
    for _ in range(10):
        page.get_by_role("button", name="Draw").click()
    _, half, code = draw(other, 3)
    page.locator("#code .cm-line").first.wait_for()
    _, whole, _ = draw(page, 3)
    assert "[0.5" in code and np.abs(half.astype(int) - whole).max() > 5
    draw(other, 4)
    assert np.array_equal(draw(other, 3)[1], half)
