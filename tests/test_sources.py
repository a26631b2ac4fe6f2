"""The table of the five sources: every link leads somewhere that shows something, every row says what became of it, no row vanishes, the stored notebook is the table, and planted faults are found."""
import ast
import csv
import json
import re
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT/"nbs"/"studies"/"sources.ipynb"
REFERENCE = ROOT/"nbs"/"studies"/"reference"
COLUMNS = ["source", "part", "item", "where", "status", "remark"]
STATUS = {"done", "done differently", "left out"}
COUNTS = dict(hacedor=56, airbus=108, oil=111, crack=36, steel=53)    # a row that is added or taken out is counted here too


def read(path):
    with open(path, newline="", encoding="utf-8") as f: return list(csv.DictReader(f))


ROWS = read(REFERENCE/"sources.csv")
LINKS = sorted({o for row in ROWS for o in row["where"].split("; ")})


# --- what a place holds

@cache
def cells(path): return json.loads(Path(path).read_text(encoding="utf-8"))["cells"]


def headings(text):
    """(level, name) of the headings of a Markdown text; a comment in a block of code is none."""
    return [(len(m[1]), m[2].strip()) for m in re.finditer(r"^(#{1,6}) (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)]


@cache
def sections(path):
    """Heading -> for each code cell below it, up to the next heading of its level or above, whether it has an output or asserts something; a name that two headings have is left out."""
    found, open_now, seen = {}, [], []
    for cell in cells(path):
        if cell["cell_type"] == "code":
            said = bool(cell.get("outputs") or re.search(r"^\s*(assert|test_\w+\()", "".join(cell["source"]), re.M))
            for name in open_now: found[name[1]].append(said)
        else:
            for level, name in headings("".join(cell["source"])):
                open_now = [o for o in open_now if o[0] < level] + [(level, name)]
                found.setdefault(name, [])
                seen.append(name)
    return {name: o for name, o in found.items() if seen.count(name) == 1}


@cache
def functions(path):
    """Name -> definition of a module's functions."""
    return {o.name: o for o in ast.parse(Path(path).read_text(encoding="utf-8")).body if isinstance(o, ast.FunctionDef)}


def checks_something(function):
    """Whether a test holds an assertion or expects an error or a warning, and is not always skipped."""
    if any(re.search(r"mark\.(skip|xfail)\b", ast.unparse(o)) for o in function.decorator_list): return False
    return any(isinstance(o, ast.Assert) or isinstance(o, ast.Call) and re.search(r"(raises|warns|assert_\w+)$", ast.unparse(o.func)) for o in ast.walk(function))


def problem(link, root=ROOT):
    """What is wrong with a link, or None."""
    if "::" in link:
        path, name = link.split("::")
        if not re.fullmatch(r"tests/test_\w+\.py", path) or not name.startswith("test_"): return f"{link}: no test of this form"
        if not (root/path).is_file(): return f"{link}: no file {path}"
        if name not in functions(root/path): return f"{link}: {path} has no {name}"
        return None if checks_something(functions(root/path)[name]) else f"{link}: it checks nothing, or is always skipped"
    path, _, part = link.partition("#")
    file = root/path
    if not file.is_file() or root.resolve() not in file.resolve().parents: return f"{link}: no file {path}"
    if path.endswith(".ipynb"): return None if part in sections(file) else f"{link}: {path} has no section '{part}', or two of this name"
    if not part: return None
    names = [name for _, name in headings(file.read_text(encoding="utf-8"))] if path.endswith(".md") else []
    return None if names.count(part) == 1 else f"{link}: {path} has no section '{part}'"


def shows(link, root=ROOT):
    """Whether a place shows something that ran, or holds numbers: a test, a file, a section with a code cell; where a study is stored with its outputs, one of the section's cells has one or asserts something."""
    if "::" in link or ".ipynb#" not in link: return True
    path, part = link.split("#")
    ran = sections(root/path).get(part, [])
    stored = path.startswith("nbs/studies/") and any(o.get("outputs") for o in cells(root/path))
    return any(ran) if stored else bool(ran)


def row_problem(row):
    """What is wrong with a row apart from where its links lead, or None."""
    if set(row) != set(COLUMNS) or None in row.values(): return f"{row.get('item')}: too many or too few fields"
    if row["source"] not in COUNTS: return f"source '{row['source']}' is unknown"
    for name in ("part", "item", "where"):
        if not row[name].strip(): return f"{row['item']}: {name} is empty"
    if row["status"] not in STATUS: return f"{row['item']}: status '{row['status']}' is unknown"
    if row["status"] != "done" and len(row["remark"].strip()) <= 15: return f"{row['item']}: {row['status']}, and no reason is given"
    places = row["where"].split("; ")
    if len(set(places)) < len(places): return f"{row['item']}: a place stands there twice"
    return next((f"{row['item']}: '{name}' has space around it or a bar in it" for name, o in row.items() if o != o.strip() or "|" in o), None)


# --- the table

@pytest.mark.parametrize("link", LINKS)
def test_every_link_leads_somewhere(link): assert problem(link) is None


def test_every_row_says_what_became_of_it():
    assert list(ROWS[0]) == COLUMNS
    assert [o for row in ROWS if (o := row_problem(row))] == []
    assert len({(o["source"], o["item"]) for o in ROWS}) == len(ROWS)


def test_no_row_vanishes():
    assert {name: sum(row["source"] == name for row in ROWS) for name in COUNTS} == COUNTS
    assert [o for o, _ in groupby(row["source"] for row in ROWS)] == list(COUNTS), "the rows of a source stand together"
    parts = [o for o, _ in groupby((row["source"], row["part"]) for row in ROWS)]
    assert len(set(parts)) == len(parts), "the rows of a part stand together"


BACKGROUND = "nbs/studies/sources.ipynb#"     # sections of text: families of detectors, difficulties, what cannot be had


def test_what_is_done_is_shown_by_something_that_ran():
    for row in ROWS:
        links = row["where"].split("; ")
        assert any(map(shows, links)) or all(o.startswith(BACKGROUND) for o in links), row


def test_every_field_of_the_oil_configuration_is_a_row():
    """With the value that its own table has, and a status that agrees with it; a field that is the same but for a detail may say so."""
    fields = {o["field"].removeprefix("model.ssd."): o for o in read(REFERENCE/"oil_config.csv")}
    rows = {(said := o["item"].removeprefix("config: ").partition(" = "))[0]: (said[2], o) for o in ROWS if o["item"].startswith("config: ")}
    assert rows.keys() == fields.keys() and len(rows) == 85
    for name, (value, row) in rows.items():
        assert value == fields[name]["value"], name
        assert row["status"] in dict(same=("done", "done differently"), other=("done differently",), none=("left out",))[fields[name]["how"]], name


# --- planted faults

@pytest.mark.parametrize("link", ["nbs/00_masks.ipynb#No such section", "nbs/00_nothing.ipynb#Masks", "tests/test_masks.py::test_nothing_of_the_kind", "tests/test_nothing.py::test_union", "nbs/params/nothing.yaml",
                                  "README.md#No such chapter", "nbs/00_masks.ipynb", "settings.ini#DEFAULT", "../settings.ini", "/etc/hosts", "tests/test_masks.py::union", "", "nbs/30_thresholds.ipynb#Into the model folder"])
def test_a_planted_broken_link_is_found(link): assert problem(link)


@pytest.mark.parametrize("change", [dict(status="waits"), dict(status=""), dict(status="Done"), dict(status="left out", remark=""), dict(status="done differently", remark="   later   "), dict(where=""), dict(where="README.md; README.md"),
                                    dict(item=" "), dict(part=""), dict(source="boats"), dict(remark="a | b"), dict(item="an item ")])
def test_a_planted_fault_in_a_row_is_found(change):
    assert row_problem({"source": "oil", "part": "Procedure"}) and row_problem(dict.fromkeys([*COLUMNS, None], "x"))
    good = dict(source="oil", part="Procedure", item="an item", where="README.md", status="done", remark="")
    assert row_problem(good) is None and row_problem(good | change)


def test_a_heading_is_the_whole_line(tmp_path):
    (tmp_path/"a.ipynb").write_text(json.dumps(dict(cells=[dict(cell_type="markdown", source=["# A\n", "\n", "> b\n"]), dict(cell_type="code", source=["1"]), dict(cell_type="markdown", source=["## B c"]),
                                                           dict(cell_type="code", source=["# ## D"], outputs=["x"]), dict(cell_type="markdown", source=["### E\n", "```bash\n", "# no heading\n", "```\n"]),
                                                           dict(cell_type="markdown", source=["## F"]), dict(cell_type="markdown", source=["## F"])])))
    assert sections(tmp_path/"a.ipynb") == {"A": [False, True], "B c": [True], "E": []}
    assert problem("a.ipynb#B c", tmp_path) is None and shows("a.ipynb#B c", tmp_path) and not shows("a.ipynb#E", tmp_path)
    for link in ("a.ipynb#B", "a.ipynb#D", "a.ipynb#b c", "a.ipynb#no heading", "a.ipynb#F"): assert problem(link, tmp_path), link


def test_a_test_that_checks_nothing_shows_nothing(tmp_path):
    (tmp_path/"tests").mkdir()
    (tmp_path/"tests"/"test_a.py").write_text("def test_no(): pass\n@pytest.mark.skip\ndef test_never(): assert 1\ndef test_plain(): assert 1\ndef test_error():\n    with pytest.raises(ValueError): f()\n"
                                              "@pytest.mark.skipif(x, reason='y')\ndef test_slow(): np.testing.assert_allclose(1, 1)\n")
    assert [name for name in functions(tmp_path/"tests"/"test_a.py") if problem(f"tests/test_a.py::{name}", tmp_path) is None] == ["test_plain", "test_error", "test_slow"]


# --- the stored notebook

def stored():
    """The Markdown of the notebook's outputs."""
    return "\n".join("".join(o["data"]["text/markdown"]) for cell in cells(NOTEBOOK) for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {}))


def test_the_stored_notebook_is_the_table():
    lines = {o.replace(" › ", ".") for o in stored().splitlines()}    # so the names of fields can break
    for row in ROWS:
        start, end = f"| {row['item'].removeprefix('config: ')} | {row['status']} | ", f" | {row['remark']} |"
        line = [o for o in lines if o.startswith(start) and o.endswith(end)]
        places = [o.rsplit("/", 1)[-1].rsplit("#", 1)[-1] if "::" not in o else o.split("::test_")[1].replace("_", " ") for o in row["where"].split("; ")]
        assert len(line) == 1 and line[0].count("](") == len(places) and all(f"{o}](" in line[0] for o in places), f"{row['item']}: run `shipnb figures sources`"
    results = json.loads((ROOT/"figures"/"sources.json").read_text(encoding="utf-8"))["results"]
    assert results["rows"] == len(ROWS) and {name: o["all"] for name, o in results["by_source"].items() if name != "all"} == COUNTS
    for name, o in results["by_source"].items():
        if name != "all": assert {k: o[k] for k in STATUS} == {k: sum(row["source"] == name and row["status"] == k for row in ROWS) for k in STATUS}


def test_its_links_open_from_jupyterlab_and_github():
    """Relative to the notebook; a notebook's anchor is its heading with hyphens for spaces, a Markdown file's is GitHub's."""
    text = stored() + "\n".join("".join(o["source"]) for o in cells(NOTEBOOK) if o["cell_type"] == "markdown")
    links = {a or b for a, b in re.findall(r"\]\((?:<([^>]*)>|([^)<>\s]*))\)", text)}
    assert len(links) > 200
    for link in links:
        if link.startswith(("https://", "http://")): continue
        path, _, anchor = link.partition("#")
        file = (NOTEBOOK.parent/path).resolve()
        assert file.is_file() and ROOT.resolve() in file.parents, link
        if file.suffix == ".ipynb": anchors = ["", *(o.replace(" ", "-") for o in sections(file))]
        elif file.suffix == ".md": anchors = ["", *(re.sub(r"[^\w -]", "", o.lower()).replace(" ", "-") for _, o in headings(file.read_text(encoding="utf-8")))]
        else: anchors = [""]
        assert anchor in anchors and re.fullmatch(r"[!-~]*", anchor) and not set(anchor) & set('`<>"%'), link


# --- parameter files that rows point at

@pytest.mark.parametrize("name, document", [
    ("crack-source", dict(size=224, backbone="resnext50_32x4d", weights="DEFAULT", negatives=800, valid_negatives=200, lr=1e-3, patience=3)),
    ("vessels-source", dict(network="maskrcnn_resnet50_fpn", pretrained=True, progress=True, trainable_backbone_layers=3, size=0, optimiser="adam")),
    ("airbus-source-model1", dict(size=256, encoder_weights="imagenet", loss={"focal": 1.0}, lr=1e-4, batch_size=16, zero_ships_ratio=0.0)),
    ("airbus-source-model2", dict(size=256, encoder_weights="imagenet", loss={"focal": 1.0}, lr=1e-4, batch_size=16, zero_ships_ratio=0.0, multiple_ships_ratio=0.3629))])
def test_parameter_files_hold_the_documents_numbers(name, document):
    values = yaml.safe_load((ROOT/"nbs"/"params"/f"{name}.yaml").read_text(encoding="utf-8"))
    assert {key: values.get(key) for key in document} == document


@pytest.mark.parametrize("name", ["model1", "model2"])
def test_the_stages_of_the_parameter_files_are_those_printed(name):
    """Stages of one rate that follow each other are one."""
    values = yaml.safe_load((ROOT/"nbs"/"params"/f"airbus-source-{name}.yaml").read_text(encoding="utf-8"))
    printed = [(float(o["lr"]), int(o["epochs"])) for o in read(REFERENCE/f"airbus_unet_{name}_stages.csv")]
    joined = [(rate, sum(n for _, n in o)) for rate, o in groupby(printed, lambda o: o[0])]
    assert values["schedule"] == "staged" and list(zip(values["schedule_options"]["rates"], values["schedule_options"]["lengths"], strict=True)) == joined
    assert values["epochs"] == sum(n for _, n in joined) and values["schedule_options"]["steps_per_epoch"] == 33662 // 16
