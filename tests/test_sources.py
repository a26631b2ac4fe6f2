"""The table of the five sources: every link leads somewhere, every row says what became of it, and a planted broken link is found."""
import ast
import csv
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT/"nbs"/"studies"/"reference"/"sources.csv"
STATUS = {"done", "done differently", "left out"}
SOURCES = ["hacedor", "airbus", "oil", "crack", "steel"]


def read(path):
    with open(path, newline="", encoding="utf-8") as f: return list(csv.DictReader(f))


ROWS = read(TABLE)
LINKS = sorted({o for row in ROWS for o in row["where"].split("; ")})


@cache
def cells(path): return json.loads(Path(path).read_text(encoding="utf-8"))["cells"]


def headings(text): return [(len(m[1]), m[2].strip()) for m in re.finditer(r"^(#{1,6}) (.+)$", text, re.M)]


@cache
def sections(path):
    """Heading -> the number of code cells below it, up to the next heading of its level or above; the title counts to the first section."""
    found, open_now = {}, []
    for cell in cells(path):
        if cell["cell_type"] == "code":
            for name in open_now: found[name[1]] += 1
        else:
            for level, name in headings("".join(cell["source"])):
                open_now = [o for o in open_now if o[0] < level] + [(level, name)]
                found.setdefault(name, 0)
    return found


@cache
def functions(path): return {o.name for o in ast.parse(Path(path).read_text(encoding="utf-8")).body if isinstance(o, ast.FunctionDef)}


def problem(link, root=ROOT):
    """What is wrong with a link, or None."""
    if "::" in link:
        path, name = link.split("::")
        if not re.fullmatch(r"tests/test_\w+\.py", path) or not name.startswith("test_"): return f"{link}: no test of this form"
        if not (root/path).is_file(): return f"{link}: no file {path}"
        return None if name in functions(root/path) else f"{link}: {path} has no {name}"
    path, _, part = link.partition("#")
    file = root/path
    if file.is_absolute() and root not in file.resolve().parents or not file.is_file(): return f"{link}: no file {path}"
    if path.endswith(".ipynb"): return None if part in sections(file) else f"{link}: {path} has no section '{part}'"
    if part and (not path.endswith(".md") or part not in [name for _, name in headings(file.read_text(encoding="utf-8"))]): return f"{link}: {path} has no section '{part}'"
    return None


@pytest.mark.parametrize("link", LINKS)
def test_every_link_leads_somewhere(link): assert problem(link) is None


def test_every_row_says_what_became_of_it():
    assert list(ROWS[0]) == ["source", "item", "where", "status", "remark"]
    for row in ROWS:
        assert row["source"] in SOURCES and row["item"] and row["where"] and row["status"] in STATUS, row
        assert row["status"] == "done" or len(row["remark"]) > 15, f"{row['item']}: {row['status']}, and no reason is given"
    assert len({(o["source"], o["item"]) for o in ROWS}) == len(ROWS)
    assert [o for o in dict.fromkeys(row["source"] for row in ROWS)] == SOURCES


def test_a_part_of_every_source_is_there():
    """Fewer rows than these would be a table that was cut."""
    counts = {name: sum(row["source"] == name for row in ROWS) for name in SOURCES}
    assert all(n >= least for n, least in zip(counts.values(), (50, 90, 60, 30, 50))), counts


def test_what_is_done_is_shown_by_something_that_runs():
    """A test, a file of parameters or of data, or a section with a code cell; background is text."""
    for row in ROWS:
        if row["status"] != "done": continue
        links = row["where"].split("; ")
        runs = [o for o in links if "::" in o or ".ipynb#" not in o or (ROOT/o.split("#")[0]).is_file() and sections(ROOT/o.split("#")[0]).get(o.split("#")[1], 0)]
        assert runs or all(o.startswith("nbs/studies/sources.ipynb#") for o in links) or not all((ROOT/o.split("#")[0]).is_file() for o in links), row


@pytest.mark.parametrize("link", ["nbs/00_masks.ipynb#No such section", "nbs/00_nothing.ipynb#Masks", "tests/test_masks.py::test_nothing_of_the_kind", "tests/test_nothing.py::test_union", "nbs/params/nothing.yaml",
                                  "README.md#No such chapter", "nbs/00_masks.ipynb", "settings.ini#DEFAULT", "../settings.ini", "tests/test_masks.py::union"])
def test_a_planted_broken_link_is_found(link): assert problem(link)


def test_a_heading_is_the_whole_line(tmp_path):
    (tmp_path/"a.ipynb").write_text(json.dumps(dict(cells=[dict(cell_type="markdown", source=["# A\n", "\n", "> b\n"]), dict(cell_type="code", source=["1"]), dict(cell_type="markdown", source=["## B c"]),
                                                           dict(cell_type="code", source=["# ## D"]), dict(cell_type="markdown", source=["### E"]), dict(cell_type="markdown", source=["## F"])])))
    assert sections(tmp_path/"a.ipynb") == {"A": 2, "B c": 1, "E": 0, "F": 0}
    assert problem("a.ipynb#B c", tmp_path) is None
    for link in ("a.ipynb#B", "a.ipynb#D", "a.ipynb#b c"): assert problem(link, tmp_path)
