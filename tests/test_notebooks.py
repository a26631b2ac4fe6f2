"""The contracts of every notebook in nbs/: what papermill, nbdev and a reader on the web rely on."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from shipnb import runs

ROOT = Path(__file__).parents[1]
NBS = ROOT/"nbs"


def is_draft(path):
    return any(part.startswith(("_", ".")) for part in path.relative_to(NBS).parts)


NOTEBOOKS = sorted(o for o in NBS.rglob("*.ipynb") if not is_draft(o))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[o.relative_to(NBS).as_posix() for o in NOTEBOOKS])


def code_cells(path):
    return [o for o in json.loads(path.read_text(encoding="utf-8"))["cells"] if o["cell_type"] == "code"]


def sources(path):
    return [runs.cell_source(o) for o in code_cells(path)]


def exports(path):
    """The module that a notebook exports, or None."""
    return next((m[1] for o in sources(path) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", o, re.M))), None)


def is_run(path):
    return any("parameters" in o["metadata"].get("tags", []) for o in code_cells(path))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 10


@every_notebook
def test_valid_small_and_for_the_plain_python_kernel(path):
    nb = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(nb)
    assert (nb.nbformat, nb.nbformat_minor) >= (4, 5) and nb.metadata.kernelspec.name == "python3"
    ids = [o["id"] for o in nb.cells]
    assert len(set(ids)) == len(ids)
    assert path.stat().st_size < 1_000_000, "over 1 MB: make figures smaller (JPEG, fewer panels) before publishing"


@every_notebook
def test_begins_with_a_title_and_a_summary(path):
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown" and re.match(r"# \S.*\n\n> \S", runs.cell_source(first))


@every_notebook
def test_parameters_are_literals_and_documented(path):
    tagged = [o for o in code_cells(path) if "parameters" in o["metadata"].get("tags", [])]
    assert len(tagged) <= 1
    for name, parameter in runs.read_parameters(path).items():
        assert parameter.comment, f"parameter {name} has no comment with its unit or range"
    if tagged: assert "out" in runs.read_parameters(path), "a notebook that is run needs the parameter out"


@every_notebook
def test_no_path_of_a_machine(path):
    assert runs.machine_paths(path) == []


@every_notebook
def test_no_star_imports_magics_shell_or_questions(path):
    for source in sources(path):
        tree = ast.parse(source)  # a magic or a shell line is no Python
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and any(o.name == "*" for o in node.names)), f"import * in: {source[:80]}"
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "input"), f"input() in: {source[:80]}"


@every_notebook
def test_module_name_and_export_cell(path):
    module = exports(path)
    if path.parent != NBS:
        assert module is None, "a study exports nothing"
        return
    assert module == re.sub(r"^\d+[a-z]?_", "", path.stem)
    assert (ROOT/"shipnb"/f"{module}.py").is_file()
    last = json.loads(path.read_text(encoding="utf-8"))["cells"][-1]
    assert last["cell_type"] == "code" and re.fullmatch(r"#\|\s*hide\nimport nbdev; nbdev\.nbdev_export\(\)\s*", runs.cell_source(last))


@every_notebook
def test_functions_have_at_most_40_lines(path):
    for source in sources(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                doc = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
                assert length - doc <= 40, f"{node.name} has {length - doc} lines of code"


@every_notebook
def test_outputs_belong_to_the_code(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    shown = any(o["outputs"] for o in nb["cells"] if o["cell_type"] == "code")
    if not shown: return
    assert nb["metadata"].get("shipnb", {}).get("hash") == runs.cells_hash(path), f"the outputs are stale; run: shipnb figures {path.stem}"
    assert not any(output["output_type"] == "error" for o in code_cells(path) for output in o["outputs"])


def top_level_imports(module):
    """Modules of this package that a module imports when it is imported."""
    body = ast.parse((ROOT/"shipnb"/f"{module}.py").read_text(encoding="utf-8")).body
    return {o.module.split(".")[0] for o in body if isinstance(o, ast.ImportFrom) and o.level == 1 and o.module}


def test_modules_import_only_what_stands_before_them():
    order = [exports(o) for o in NOTEBOOKS if o.parent == NBS and exports(o)]
    assert {"catalog", "splits"} <= top_level_imports("training"), "imports of generated modules are not seen"
    late = [(module, other) for i, module in enumerate(order) for other in top_level_imports(module) if other not in order[:i]]
    assert not late, f"imports of a later or unknown notebook: {late}"


def test_exported_code_does_not_use_the_test_helpers():
    users = [o.name for o in (ROOT/"shipnb").glob("[!_]*.py") if re.search(r"^\s*(from|import) (fastcore|nbdev)\b(?!\.clean)", o.read_text(encoding="utf-8"), re.M)]
    assert not users


# --- what nbdev_clean must not break

def cleaned(folder, settings):
    """A notebook with a parameters cell in a project of its own, after nbdev_clean with these settings."""
    (folder/"settings.ini").write_text(settings)
    kernel = dict(display_name="python3", language="python", name="python3")
    code = lambda source, tags: dict(cell_type="code", id=f"a{len(source)}", metadata=dict(tags=tags), source=source, execution_count=None, outputs=[])
    cells = [code("epochs = 3  # count, >= 1; epochs = 1 is quick\n", ["parameters"]), code("import pathlib\npathlib.Path('got.txt').write_text(str(epochs))", [])]
    path = folder/"nbs"/"20_small.ipynb"
    path.parent.mkdir()
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel, shipnb=dict(hash="0")), nbformat=4, nbformat_minor=5)))
    command = [sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", "--fname", str(path)]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return path


def test_injected_values_win_after_nbdev_clean(tmp_path):
    """The real chain: nbdev_clean with this repository's settings, then plain papermill."""
    path = cleaned(tmp_path, (ROOT/"settings.ini").read_text(encoding="utf-8"))
    nb = json.loads(path.read_text())
    assert nb["cells"][0]["metadata"]["tags"] == ["parameters"] and nb["metadata"]["shipnb"] == {"hash": "0"}
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", path.name, "../out.ipynb", "-p", "epochs", "7"]
    subprocess.run(command, cwd=path.parent, check=True, timeout=120, capture_output=True)
    assert (path.parent/"got.txt").read_text() == "7"


def test_without_our_setting_nbdev_clean_takes_the_tag_away(tmp_path):
    """The trap is real: were the setting lost, the test above would fail."""
    settings = (ROOT/"settings.ini").read_text(encoding="utf-8").replace("allowed_cell_metadata_keys = tags", "")
    assert "tags" not in json.loads(cleaned(tmp_path, settings).read_text())["cells"][0]["metadata"]


# --- the named runs

PARAMETER_FILES = sorted((NBS/"params").glob("*.yaml"))


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=[o.stem for o in PARAMETER_FILES])
def test_parameter_files_name_only_what_their_notebook_knows(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    notebook = runs.overrides_notebook(path)
    if notebook:
        values = runs.read_overrides(path, notebook)
        assert values and runs.check_parameters(runs.read_parameters(runs.find_notebook(notebook)), values)
    else:
        assert path.read_text(encoding="utf-8").startswith("# study: "), "the first line must be: # notebook: NAME, or # study: WHAT"
        assert sum(bool(step.given) for step in runs.study_plan(files=[str(path)])) > 1, "a file for one notebook names it in its first line"
    bare = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"\s*\w+:\s*\S", line) and "#" not in line]
    assert not bare, f"every override gives its reason: {bare}"
    assert yaml.safe_load(path.read_text(encoding="utf-8"))
