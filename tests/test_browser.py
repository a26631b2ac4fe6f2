"""Notebooks in the real JupyterLab: a browser opens them, Run All runs them to the end without an edit."""
import csv
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest

from shipnb import fleet
from shipnb.catalog import read_airbus
from shipnb.cleaning import read_exclude

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY_NOT = "no Chromium is installed (apt-get install chromium)"


@pytest.fixture(autouse=True, scope="module")
def chromium():
    """Without Chromium these tests skip; where SHIPNB_BROWSER=1 says that it must be there, as in CI, they fail."""
    if CHROMIUM is None: (pytest.fail if os.environ.get("SHIPNB_BROWSER") == "1" else pytest.skip)(WHY_NOT)


QUIET = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SECONDS = 240   # for anything that is waited for; a quiet machine needs less than 30
READY = """() => {
    const session = window.jupyterapp?.shell?.currentWidget?.sessionContext;
    return Boolean(session?.isReady) && session.session?.kernel?.status === 'idle';
}"""
RUN_ALL = """() => {
    const settle = how => { window.shipnbRunAll = how; };
    jupyterapp.commands.execute('notebook:run-all-cells').then(() => settle('ended'), error => settle(String(error)));
}"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the notebooks with the sample beside them: what a run writes stays out of the repository."""
    folder, here = tmp_path_factory.mktemp("lab")/"shipnb", Path.cwd()
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_*"))
    shutil.copy(ROOT/"settings.ini", folder)
    (folder/"data").mkdir()
    os.chdir(ROOT)
    try: (folder/"data"/"sample").symlink_to(fleet.sample())
    finally: os.chdir(here)
    return folder


def own_environment(folder):
    """This process's environment with Jupyter's folders elsewhere, so that no setting of this account counts."""
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    plain = {k: v for k, v in os.environ.items() if k != "MPLBACKEND" and not k.startswith("PYTEST_")}
    return {**plain, **{name: str(folder/name.lower()) for name in names}}


def wait_for(url, process, log):
    """Wait until a server answers, or say what it wrote."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5): return
        except (urllib.error.URLError, OSError): time.sleep(0.2)
    pytest.fail(f"JupyterLab does not answer at {url}:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def lab(checkout):
    """The address of a JupyterLab on the copy."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--expose-app-in-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={checkout}"]
    log = checkout.parent/"lab.log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=checkout, env=own_environment(checkout.parent), stdout=out, stderr=out)
    try:
        wait_for(f"http://127.0.0.1:{port}/api", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()   # the server ends its kernels
        try: process.wait(30)
        except subprocess.TimeoutExpired: process.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def run_all(page, address):
    """Open a notebook, choose Run All, and return it as JSON when the kernel is idle again."""
    page.goto(address)
    page.wait_for_function(READY)
    page.evaluate(RUN_ALL)   # before the kernel is ready, Run All does nothing, silently
    page.wait_for_function("() => window.shipnbRunAll")
    page.wait_for_function(READY)
    return page.evaluate("() => jupyterapp.shell.currentWidget.model.toJSON()")


@pytest.mark.parametrize("name", ["00_masks", "07_sampler"])
def test_run_all_works_without_an_edit(name, lab, browser, checkout, tmp_path):
    page = browser.new_page(viewport=dict(width=1300, height=1000))
    page.set_default_timeout(1000 * SECONDS)
    try:
        nb = run_all(page, f"{lab}/lab/tree/nbs/{name}.ipynb?reset")
        page.screenshot(path=tmp_path/f"{name}.png")
    finally: page.close()
    code = [o for o in nb["cells"] if o["cell_type"] == "code" and "".join(o["source"]).strip()]
    errors = [f"{output['ename']}: {output['evalue']}" for o in code for output in o["outputs"] if output["output_type"] == "error"]
    assert not errors
    assert [o["execution_count"] for o in code] == list(range(1, len(code) + 1))
    # each cell ran here, once, in order, and none was changed for it
    assert nb["metadata"]["kernelspec"]["name"] == "python3" and any(o["outputs"] for o in code)
    if name == "07_sampler": assert (checkout/"runs"/"default"/name/"results.json").is_file()


# --- explore: what a person does with it

def until(said, *wanted):
    """Wait until a function gives one of the wanted values (a callable: is true of it), and return what it gives. The browser draws when it likes."""
    end = time.monotonic() + SECONDS
    while True:
        got = said()
        if any(o(got) if callable(o) else got == o for o in wanted): return got
        assert time.monotonic() < end, f"the browser still shows {got!r}"
        time.sleep(.1)


def pictures(page):
    """(width, height) of the pictures that are seen; each must be one that the browser could decode."""
    return page.evaluate("() => [...document.querySelectorAll('.shipnb-explore .shipnb-tile img')].map(o => [o.naturalWidth, o.naturalHeight])")


def captions(page):
    return page.locator(".shipnb-explore .shipnb-tile .widget-html").all_inner_texts()


def test_explore_filters_pages_marks_and_saves(lab, browser, checkout, tmp_path):
    saved = checkout/"runs"/"excluded.csv"
    page = browser.new_page(viewport=dict(width=1500, height=1250))
    page.set_default_timeout(1000 * SECONDS)
    look = lambda name: page.screenshot(path=tmp_path/f"{name}.png")
    try:
        nb = run_all(page, f"{lab}/lab/tree/nbs/03c_explore.ipynb?reset")
        errors = [o["evalue"] for cell in nb["cells"] if cell["cell_type"] == "code" for o in cell["outputs"] if o["output_type"] == "error"]
        assert not errors
        tool = page.locator(".shipnb-explore")
        text = lambda: re.sub(r"\s+", " ", tool.inner_text())
        names = lambda: [o.split()[0] for o in captions(page)]
        press = lambda name: tool.get_by_role("button", name=name).click()
        write = lambda place, what: (tool.get_by_placeholder(place).fill(what), tool.get_by_placeholder(place).press("Enter"))
        tool.scroll_into_view_if_needed()
        catalog = read_airbus(checkout/"data"/"sample")
        order, counts = catalog.images["image"].tolist(), catalog.counts
        order[3] = "lost.jpg"       # the notebook's own example of an image that is not there

        # the page it begins with, then without filters: the lost image among them
        several = [name for name, count in zip(order, counts) if count >= 3]
        until(names, several[:20])
        until(lambda: pictures(page), lambda o: len(o) == len(several[:20]) and all(max(size) == 176 for size in o))
        look("begin")
        press("clear filters")
        until(names, order[:20])
        until(lambda: pictures(page), [[176, 176]] * 20)
        assert f"{len(order)} of {len(order)} images" in text() and "unreadable" in captions(page)[3]
        look("all")

        # filters: split, note, and both
        write("name, scene or note", "busy")
        busy = [name for name, count in zip(order, counts) if count > 3]
        until(names, busy[:20])
        tool.get_by_role("combobox").first.select_option("valid")
        valid = [name for i, (name, count) in enumerate(zip(order, counts)) if count > 3 and i % 5 == 0]
        until(names, valid)
        assert 0 < len(valid) < len(busy) and f"{len(valid)} of {len(order)} images" in text()
        look("filter")
        write("name, scene or note", "no such note")
        until(names, [])
        until(text, lambda o: "No image fits" in o)
        look("nothing")
        press("clear filters")

        # a page further: mark the fifth, open one with objects
        until(names, order[:20])
        tool.get_by_title("next page").click()
        until(names, order[20:40])
        tool.locator(".shipnb-mark").nth(4).click()
        until(lambda: tool.locator(".shipnb-out").count(), 1)
        until(text, lambda o: "not saved yet" in o and "1 excluded" in o)
        assert not saved.exists()
        look("marked")
        other = 20 + max((i for i in range(20) if i != 4), key=lambda i: counts[20 + i])
        tool.locator(".shipnb-hit").nth(other - 20).click()
        size = "() => { const o = document.querySelector('.shipnb-large img'); return o && [o.naturalWidth, o.naturalHeight, o.width]; }"
        until(lambda: page.evaluate(size), [768, 768, 768])
        until(lambda: tool.locator(".shipnb-facts b").inner_text(), order[other])
        write("why it is left out", "glare, half of the image")
        until(text, lambda o: "2 excluded" in o)
        look("large")

        # a list that cannot be written: a sentence; then it can
        saved.mkdir(parents=True)
        press("save list")
        until(text, lambda o: "not saved: " in o and "The marks are still here" in o)
        look("not_saved")
        saved.rmdir()
        press("save list")
        until(text, lambda o: "2 names saved in runs/excluded.csv" in o)
        with open(saved, newline="") as f: assert list(csv.reader(f)) == [["ImageId", "Note"], [order[24], ""], [order[other], "glare, half of the image"]]
        assert read_exclude(saved) == [order[24], order[other]]
        press("all images")
        until(lambda: tool.locator(".shipnb-out").count(), 2)
        until(names, order[20:40])

        # the colours are the theme's
        colour = lambda: page.evaluate("() => getComputedStyle(document.querySelector('.shipnb-tile')).backgroundColor")
        light = colour()
        page.evaluate("() => jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        until(colour, lambda o: o != light)
        look("dark")
    finally: page.close()


# --- the curves of a training: redrawn in place, and in TensorBoard

LOGS = '''
import time
from shipnb.logs import Board, LiveCurves, show_board
history = [dict(epoch=k, step=8 * k, loss=1 / (k + 1), valid_loss=1.1 / (k + 1), dice=k / 10, dice_with=k / 12, dice_without=.5, iou=k / 20) for k in range(4)]
# %%
live = LiveCurves()
live.update(history[:1])
# %%
time.sleep(3)
live.update(history)
# %%
board = Board("../runs/board")
for row in history: board.epoch(row, row["step"])
board.close()
show_board("../runs/board")
'''
COLLECT = """() => {
    window.shipnbSeen = new Set();
    setInterval(() => document.querySelectorAll('.jp-OutputArea img').forEach(o => window.shipnbSeen.add(o.src)), 50);
}"""


def write_notebook(path, text):
    """A notebook of the cells of a script."""
    import nbformat
    cells = [nbformat.v4.new_code_cell(o.strip()) for o in text.split("# %%")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3"))), path)


def end_boards(folder):
    """End the TensorBoards that look at a folder; a notebook's stays behind its kernel."""
    import psutil
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any("tensorboard" in o for o in words) and any(str(folder) in o for o in words): process.kill()


def test_curves_are_redrawn_in_place_and_tensorboard_opens_in_the_notebook(lab, browser, checkout, tmp_path):
    (checkout/"runs").mkdir(exist_ok=True)
    write_notebook(checkout/"nbs"/"curves_here.ipynb", LOGS.replace("../runs/board", str(checkout/"runs"/"board")))
    page = browser.new_page(viewport=dict(width=1300, height=1100))
    page.set_default_timeout(1000 * SECONDS)
    try:
        page.add_init_script(f"({COLLECT})()")
        nb = run_all(page, f"{lab}/lab/tree/nbs/curves_here.ipynb?reset")
        outputs = [o["outputs"] for o in nb["cells"]]
        assert not [o for one in outputs for o in one if o["output_type"] == "error"]
        assert [len([o for o in one if "image/png" in o.get("data", {})]) for one in outputs] == [0, 1, 0, 0], "one figure, where it was first shown"
        until(lambda: page.locator(".jp-OutputArea img").count(), 1)
        assert page.evaluate("() => window.shipnbSeen.size") == 2, "the figure was to change once"
        inside = lambda: " ".join(o.locator("body").inner_text() for o in page.frames[1:] if o.locator("body").count())
        until(inside, lambda o: "dice_with" in o)
        page.locator("iframe").first.scroll_into_view_if_needed()
        page.screenshot(path=tmp_path/"curves_and_board.png")
    finally:
        page.close()
        end_boards(checkout/"runs"/"board")


# --- threshold_explorer: what a person does with it

ASK = """async code => {
    const future = jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code, store_history: false});
    let text = '';
    future.onIOPub = message => { text += message.content.text ?? message.content.evalue ?? ''; };
    await future.done;
    return text;
}"""
BY_HAND = """import json, matplotlib
from shipnb.metrics import dice, object_counts, object_f2
maps = [keep(levels[o.image], {logit}, {area}) for o in evidence.records]
both = [object_counts(*o) for o in zip(maps, truths)]
found, true, kept = sum(int(o[2][0]) for o in both), sum(o[1] for o in both), sum(o[0] for o in both)
print(json.dumps(dict(dice=float(np.mean([dice(p > 0, t > 0) for p, t in zip(maps, truths)])), f2=float(np.mean([object_f2(*o) for o in zip(maps, truths)])),
                      found=found, missed=true - found, false=kept - found, missed_in=[int(o[1] - o[2][0]) for o in both],
                      false_in=[int(o[0] - o[2][0]) for o in both], backend=matplotlib.get_backend())))"""

DRAWN = """import json
seen = [o for o in Out.values() if isinstance(o, ThresholdExplorer)][0].canvas
print(json.dumps([*np.asarray(seen.buffer_rgba()).shape[1::-1], *map(int, np.asarray(seen.buffer_rgba()).astype(np.int64).reshape(-1, 4).sum(0)),
                  int((np.asarray(seen.buffer_rgba()).astype(np.int64).reshape(-1, 4)[:, 0] * (np.arange(seen.figure.bbox.width * seen.figure.bbox.height) % 9973)).sum())]))"""
SEEN = """() => {
    const canvas = document.querySelector('.shipnb-thresholds .jupyter-matplotlib-canvas-div canvas'), {width, height} = canvas;
    const pixels = canvas.getContext('2d').getImageData(0, 0, width, height).data, sums = [0, 0, 0, 0];
    let places = 0;
    for (let i = 0; i < pixels.length; i++) sums[i % 4] += pixels[i];
    for (let i = 0; i < pixels.length; i += 4) places += pixels[i] * (i / 4 % 9973);
    return [width, height, ...sums, places];
}"""


def test_threshold_explorer_follows_the_mouse(lab, browser, tmp_path):
    """Sliders, the surface, the steps: what is shown at a setting is what thresholding, labelling and matching give in the same kernel."""
    page, complaints = browser.new_page(viewport=dict(width=1500, height=1250)), []
    page.set_default_timeout(1000 * SECONDS)
    look = lambda name: page.screenshot(path=tmp_path/f"{name}.png")
    try:
        nb = run_all(page, f"{lab}/lab/tree/nbs/30d_explorer.ipynb?reset")
        assert not [o["evalue"] for cell in nb["cells"] if cell["cell_type"] == "code" for o in cell["outputs"] if o["output_type"] == "error"]
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        tool = page.locator(".shipnb-thresholds")
        tool.scroll_into_view_if_needed()
        text = lambda: re.sub(r"\s+", " ", tool.inner_text())
        cell = lambda name, column=1: tool.locator(".shipnb-table tr").filter(has_text=re.compile(f"^{name}")).first.locator("td").nth(column).inner_text()
        logit = lambda: float(re.search(r"log-odds ([-\d.]+)", text())[1])
        area = lambda: int(re.search(r"smallest area (\d+) px", text())[1])
        photo = lambda: page.evaluate("() => { const o = document.querySelector('.shipnb-photo img'); return o.complete && o.naturalWidth ? [o.src, o.naturalWidth, o.naturalHeight] : null; }")
        name = lambda: tool.get_by_role("spinbutton").input_value()

        def agrees():
            """The table is that of the setting that is shown."""
            page.wait_for_function(READY)
            hand = json.loads(page.evaluate(ASK, BY_HAND.format(logit=logit(), area=area())))
            until(lambda: cell("Dice"), f"{hand['dice']:.4f}")
            until(lambda: cell("object F2"), f"{hand['f2']:.4f}")
            assert cell("objects found").startswith(f"{hand['found']} of ") and (cell("missed"), cell("false alarms")) == (str(hand["missed"]), str(hand["false"]))
            return hand

        def surface_is_current():
            """The canvas holds, pixel for pixel, what the kernel drew last."""
            page.wait_for_function(READY)
            drawn = json.loads(page.evaluate(ASK, DRAWN))
            until(lambda: page.evaluate(SEEN), drawn)

        until(photo, lambda o: o and o[1:] == [512, 512])
        assert "inline" in agrees()["backend"]      # ipympl draws the surface, and no other figure
        look("begin")

        # the threshold, dragged: everything follows while the button is down
        handle = tool.locator(".noUi-handle").first.bounding_box()
        before, seen = (logit(), cell("Dice"), photo()[0]), []
        page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
        page.mouse.down()
        for step in (15, 30, 45, 60):
            page.mouse.move(handle["x"] + step, handle["y"] + handle["height"] / 2)
            until(logit, lambda o: o not in seen and o > before[0])
            seen.append(logit())
        page.mouse.up()
        assert seen == sorted(seen) and len(set(seen)) == 4
        until(photo, lambda o: o and o[0] != before[2])
        agrees()
        surface_is_current()
        look("dragged")

        def dot():
            """Where the dot is on the canvas, as shares of its width and height."""
            (a, b) = tool.locator(".shipnb-dot i").bounding_box(), tool.locator(".jupyter-matplotlib-canvas-div canvas").last.bounding_box()
            return (a["x"] + a["width"] / 2 - b["x"]) / b["width"], (a["y"] + a["height"] / 2 - b["y"]) / b["height"]

        # a click on the surface: there, and back
        canvas = tool.locator(".jupyter-matplotlib-canvas-div canvas").last
        box = canvas.bounding_box()
        click = lambda x, y: page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
        click(.3, .75)
        until(logit, lambda o: o < before[0])
        low, few = logit(), area()
        agrees()
        click(.45, .25)
        until(logit, lambda o: o > low)
        until(area, lambda o: o > few)
        agrees()
        until(lambda: np.abs(np.subtract(dot(), (.45, .25))).max(), lambda o: o < .03)   # under the mouse, to half a row of the surface
        surface_is_current()
        look("clicked")

        # misses and false alarms: the images that have them, in order, from the setting at hand
        click(.3, .75)
        until(logit, low)
        hand = agrees()
        for kind, button in (("missed", "next image with a miss"), ("false", "next image with a false alarm")):
            here, with_one = int(name()) - 1, [i for i, o in enumerate(hand[f"{kind}_in"]) if o]
            wanted = ([i for i in with_one if i > here] or with_one)[0]
            tool.get_by_role("button", name=button).click()
            until(name, str(wanted + 1))
            until(lambda: [cell("missed", 2), cell("false alarms", 2)], [str(hand[o][wanted]) for o in ("missed_in", "false_in")])
        here = photo()[0]
        tool.get_by_role("combobox").first.select_option("4 times")
        until(photo, lambda o: o and o[0] != here and o[1:] == [560, 560])
        tool.get_by_role("button", name="next miss").click()
        until(lambda: int(cell("missed", 2)), lambda o: o > 0)
        look("zoomed")

        # another objective: its surface, its best setting
        tool.get_by_role("combobox").nth(1).select_option("object F2")
        tool.get_by_role("button", name="go to the best").click()
        until(logit, lambda o: o != low)
        agrees()
        surface_is_current()
        look("best")
        assert not complaints
    finally: page.close()


# --- threshold_explorer: how long a person waits. A measurement, not a bar: no time is asserted

LARGE = (("subset(np.arange(24))", "subset(np.arange({images}))"), ("grid = (256, 256)", "grid = catalog.shape(0)"), ("walk.open(40)", "walk.open(400)"), ("0 to 23", "0 to"))
BARE = """import ipywidgets
bare, said = ipywidgets.IntSlider(max=1000), ipywidgets.HTML("")
said.add_class("bare-said")
bare.observe(lambda change: setattr(said, "value", str(change["new"])), "value")
bare.add_class("bare-slider")
ipywidgets.VBox([bare, said])"""
KERNEL = """import json, ipympl, ipywidgets
def timed(act, times=50):
    wall, processor = [], []
    for k in range(times):
        w, p = time.perf_counter(), time.process_time()
        act(k)
        wall.append(1000 * (time.perf_counter() - w)); processor.append(1000 * (time.process_time() - p))
    return dict(wall=wall, processor=processor)
there = [o for o in Out.values() if isinstance(o, ThresholdExplorer)][0]
rng = np.random.default_rng(0)
to = [(EDGES[k], int(a)) for k, a in zip(rng.integers(edge_index(-4), edge_index(4), 50), rng.choice(MIN_AREAS, 50))]
move = timed(lambda k: there.set(*to[k]))
image = timed(lambda k: there.open((7 * k + 1) % len(evidence)))
print(json.dumps(dict(move=move, image=image, images=len(evidence), shape=catalog.shape(0), nodes=int(np.median([len(o.level) for o in evidence.records])),
                      levels=sum(map(len, levels.maps.values())) / len(levels), versions={o.__name__: o.__version__ for o in (np, cv2, matplotlib, ipywidgets, ipympl)})))"""
GO_TO = "there.set({logit}, 0); print(there.walk.shown.scores['n_pred'])"
WATCH = """([number, picture]) => {
    const waits = window.shipnbWaits = {numbers: [], picture: []}, photo = document.querySelector(picture);
    window.addEventListener('keydown', () => { window.shipnbPressed = performance.now(); }, true);
    new MutationObserver(() => { if (waits === window.shipnbWaits) waits.numbers.push(performance.now() - window.shipnbPressed); })
        .observe(document.querySelector(number), {childList: true, subtree: true, characterData: true});
    if (photo) new MutationObserver(async () => { const from = window.shipnbPressed; await photo.decode(); waits.picture.push(performance.now() - from); })
        .observe(photo, {attributes: true, attributeFilter: ['src']});
}"""


def waits(page, slider, number, picture="none", keys=50):
    """Milliseconds from each of some keys on a slider until the page shows the number, and until it has decoded the picture."""
    handle = page.locator(f"{slider} .noUi-handle").first
    handle.scroll_into_view_if_needed()
    page.evaluate(WATCH, [number, picture])
    handle.focus()
    for k in range(keys):
        page.keyboard.press("ArrowRight" if k % 20 < 10 else "ArrowLeft")
        page.wait_for_function("([k, both]) => window.shipnbWaits.numbers.length > k && (!both || window.shipnbWaits.picture.length > k)", arg=[k, picture != "none"])
        page.wait_for_timeout(200)
    found = page.evaluate("() => window.shipnbWaits")
    assert [len(o) for o in found.values()] == [keys, keys if picture != "none" else 0]
    return found


def quartiles(values):
    lowest, low, median, high, highest = np.quantile(values, [0, .25, .5, .75, 1]).round(1).tolist()
    return dict(median=median, quartiles=[low, high], lowest=lowest, highest=highest, n=len(values))


@pytest.mark.skipif("SHIPNB_SLOW" not in os.environ, reason="SHIPNB_SLOW is not set: 200 large maps take some minutes to make; SHIPNB_PUBLISH writes figures/30d_explorer_cost.json")
def test_how_long_the_explorer_takes(lab, browser, checkout, tmp_path):
    """200 images at their own size: a move, another image, and a key on the slider until the browser has decoded the new picture; each key must bring one. Beside it the same for a slider with nothing behind it."""
    nb = nbformat.read(checkout/"nbs"/"30d_explorer.ipynb", 4)
    last = next(i for i, o in enumerate(nb.cells) if o.source.startswith("threshold_explorer(evidence, catalog, levels"))
    nb.cells = [*nb.cells[:last + 1], nbformat.v4.new_code_cell(BARE)]
    text = nbformat.writes(nb)
    for before, after in LARGE:
        assert text.count(before) == 1
        text = text.replace(before, after.format(images=min(200, len(read_airbus(checkout/"data"/"sample")))))
    (checkout/"nbs"/"large.ipynb").write_text(text)
    page = browser.new_page(viewport=dict(width=1500, height=1250))
    page.set_default_timeout(2000 * SECONDS)
    try:
        nb = run_all(page, f"{lab}/lab/tree/nbs/large.ipynb?reset")
        assert not [o["evalue"] for cell in nb["cells"] if cell["cell_type"] == "code" for o in cell["outputs"] if o["output_type"] == "error"]
        print("measuring", flush=True)
        load = os.getloadavg()[0]
        kernel, times = json.loads(page.evaluate(ASK, KERNEL)), {}
        times |= {"move, kernel": kernel["move"]["wall"], "another image, kernel": kernel["image"]["wall"]}
        times["key to number, a slider with nothing behind it, browser"] = waits(page, ".bare-slider", ".bare-said")["numbers"]
        for logit in (-4.5, -6.5):
            kept = int(page.evaluate(ASK, GO_TO.format(logit=logit)))
            found = waits(page, ".shipnb-thresholds", ".shipnb-setting", ".shipnb-photo img")
            times |= {f"key to {name}, {kept:,} components in the image, browser": o for name, o in found.items()}
        page.screenshot(path=tmp_path/"large.png")
    finally: page.close()
    report = dict(what=f"threshold_explorer on {kernel['images']} images of {kernel['shape'][0]} x {kernel['shape'][1]} (planted maps on the sample; {kernel['nodes']:,} components in the median image's tree, "
                       f"levels of {kernel['levels'] / 1000:.0f} kB an image): a move to a random setting, and another image, in the kernel; a key on the slider until the browser shows the number, and until it has decoded the picture",
                  milliseconds={name: quartiles(o) for name, o in times.items()},
                  processor_milliseconds={"move, kernel": quartiles(kernel["move"]["processor"]), "another image, kernel": quartiles(kernel["image"]["processor"])},
                  images=kernel["images"], device=f"cpu, {os.cpu_count()} cores, load {load:.1f} before; Chromium {browser.version} headless, without a GPU", python=platform.python_version(), versions=kernel["versions"],
                  commit=subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip())
    print(json.dumps(report, indent=1))
    if os.environ.get("SHIPNB_PUBLISH"): (ROOT/"figures"/"30d_explorer_cost.json").write_text(json.dumps(report, indent=1) + "\n")
