"""shipnb.runs: papermill's contracts, run folders, the study and the command line, on throw-away notebooks."""
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given as forall
from hypothesis import strategies as st

from shipnb import runs

TIMEOUT = 300  # seconds, for anything that is waited for


def cell(source, kind="code", tags=()):
    extra = dict(execution_count=None, outputs=[]) if kind == "code" else {}
    return dict(cell_type=kind, id=f"c{abs(hash((source, tuple(tags)))) % 10**8}", metadata=dict(tags=list(tags)), source=source, **extra)


def write_notebook(path, *sources, parameters=None):
    cells = [cell(parameters, tags=["parameters"])] if parameters else []
    cells += [cell(o) for o in sources]
    kernel = dict(display_name="python3", language="python", name="python3")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    return path


PARAMETERS = '''out = ""  # folder; "" = default
epochs = 3  # count, >= 1
lr = 1e-3  # lr = 3e-3 is faster, lr >= 0
amp = False  # on == faster
sizes = [128, 256]  # pixels
'''
WRITE = """import json, os
from pathlib import Path
folder = Path(__import__("shipnb.files", fromlist=["files"]).resolve(out))
(folder / "results.json").write_text(json.dumps(dict(metrics=dict(dice=lr * epochs), fingerprint="abc123", cwd=os.getcwd(), values=[epochs, lr, amp, sizes])))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project root with one notebook, as the working folder."""
    (tmp_path/"settings.ini").write_text("[DEFAULT]\nlib_name = toy\nallowed_metadata_keys = shipnb\nallowed_cell_metadata_keys = tags\n")
    write_notebook(tmp_path/"nbs"/"20_toy.ipynb", WRITE, parameters=PARAMETERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_kernel(monkeypatch):
    """Run cells in this process: for what does not depend on kernels, without their second each."""
    def execute(notebook, values, output, *rest):
        nb, names = runs.load_notebook(notebook), {}
        output.write_text(json.dumps(nb))
        for one in nb["cells"]:
            try: exec(runs.cell_source(one), names)
            except Exception as error: raise runs.NotebookFailed(repr(error)) from error
            if "parameters" in one["metadata"]["tags"]: names.update(values)
        return runs.environment()
    monkeypatch.setattr(runs, "execute", execute)


# --- parameters

def test_comments_with_equal_signs_do_not_hide_parameters(project):
    found = runs.read_parameters(project/"nbs"/"20_toy.ipynb")
    assert {k: o.default for k, o in found.items()} == dict(out="", epochs=3, lr=1e-3, amp=False, sizes=[128, 256])
    assert found["lr"].comment == "lr = 3e-3 is faster, lr >= 0"


@pytest.mark.parametrize("source, message", [
    ("a = 1 + b", "must hold literals"), ("a, b = 1, 2", "only lines `name = literal`"), ("a = b = 1", "only lines"), ("print(1)", "only lines"),
    ("import os", "only lines"), ("a =", "not Python"), ("a: int", "only lines"), ("a = open('x')", "must hold literals")])
def test_a_parameters_cell_holds_literals_only(tmp_path, source, message):
    with pytest.raises(ValueError, match=message): runs.read_parameters(write_notebook(tmp_path/"a.ipynb", "", parameters=source))


def test_two_parameters_cells_are_refused(tmp_path):
    path = write_notebook(tmp_path/"a.ipynb", "", parameters="a = 1")
    nb = json.loads(path.read_text())
    nb["cells"].append(cell("b = 1", tags=["parameters"]))
    with pytest.raises(ValueError, match="2 cells are tagged"): runs.read_parameters(nb)


@pytest.mark.parametrize("default, value, wanted", [
    (1.0, 2, 2.0), (1.0, "1e-3", 1e-3), (1, 5, 5), ("", "x", "x"), (True, False, False), (None, [1], [1]), ([1], [2, 3], [2, 3]),
    ([0.5], [1, 0.25], [1, 0.25]), ((1, 2), [3, 4], [3, 4]), ([], ["a", 1], ["a", 1]), ({}, {"a": 1}, {"a": 1})])
def test_allowed_values(default, value, wanted):
    got = runs.check_value(runs.Parameter("p", default), value)
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize("default, value", [
    (1, True), (1.0, True), (1, 2.0), (1, "1"), (True, 1), (True, "yes"), ("", 1), ("", None), (1.0, "fast"), ([1], ["a"]), ([1], [True]), ([1], 3),
    (["a"], [1]), ({}, [1]), (1.0, None)])
def test_refused_values(default, value):
    with pytest.raises(ValueError, match=r"parameter p = .* is of type \w+; allowed is"): runs.check_value(runs.Parameter("p", default), value)


@forall(st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False), st.text(), st.lists(st.integers())))
def test_a_value_of_the_default_s_own_type_survives_the_command_line(value):
    parameter = runs.Parameter("p", value)
    text = value if isinstance(value, str) else repr(value)
    if not isinstance(value, str): assert runs.check_value(parameter, runs.parse_text(parameter, text)) == value
    else: assert isinstance(runs.check_value(parameter, runs.parse_text(parameter, text)), str)


@pytest.mark.parametrize("text", ["no", "on", "null", "1e3", "007", "2024-01-01", "~", "a: b", "[1]"])
def test_text_stays_text(text):
    assert runs.parse_text(runs.Parameter("p", ""), text) == text


def test_unknown_names_are_refused_with_the_allowed_ones():
    parameters = {"epochs": runs.Parameter("epochs", 3), "lr": runs.Parameter("lr", 0.1)}
    with pytest.raises(ValueError, match="unknown parameter epoch; did you mean epochs.*allowed are: epochs, lr"):
        runs.check_parameters(parameters, {"epoch": 1})


@pytest.mark.parametrize("text, message", [("- a\n", "must be a mapping"), ("3", "must be a mapping"), ("a: [", "not YAML"), ("1: 2", "must be a mapping")])
def test_bad_parameter_files(tmp_path, text, message):
    (tmp_path/"p.yaml").write_text(text)
    with pytest.raises(ValueError, match=message): runs.read_overrides(tmp_path/"p.yaml")


# --- running

def test_values_win_the_folder_is_the_notebook_s_and_the_record_is_complete(project):
    record = runs.run_notebook("toy", dict(epochs=5, lr=1), say=lambda line: None)
    folder = project/"runs"/runs.default_name("20_toy", pairs=dict(epochs=5, lr=1))
    results = json.loads((folder/"results.json").read_text())
    assert results["values"] == [5, 1.0, False, [128, 256]]
    assert Path(results["cwd"]).samefile(project/"nbs")
    saved = json.loads((folder/"run.json").read_text())
    assert saved["status"] == record["status"] == "finished" and saved["metrics"] == {"dice": 5.0} and saved["fingerprint"] == "abc123"
    assert saved["parameters"] == dict(out=folder.relative_to(project).as_posix(), epochs=5, lr=1.0, amp=False, sizes=[128, 256])
    assert saved["environment"]["python"].startswith("3.") and saved["minutes"] > 0 and len(saved["code_hash"]) == 64
    assert runs.read_overrides(folder/"params.yaml", "20_toy") == saved["parameters"]
    executed = json.loads((folder/"20_toy.ipynb").read_text())
    assert any("injected-parameters" in o["metadata"].get("tags", []) for o in executed["cells"])


def test_finished_is_not_run_again_other_code_is_other_parameters_are_refused(project, no_kernel):
    lines, folder = [], project/"runs"/"a"
    first = runs.run_notebook("toy", dict(epochs=5), folder, say=lines.append)
    again = runs.run_notebook("toy", dict(epochs=5), folder, say=lines.append)
    assert first["again"] and not again["again"] and again["started"] == first["started"] and "not run again" in lines[-1]
    with pytest.raises(ValueError, match=r"another configuration \(epochs was 5, now 6\)"): runs.run_notebook("toy", dict(epochs=6), folder)
    assert json.loads((folder/"run.json").read_text())["parameters"]["epochs"] == 5
    write_notebook(project/"nbs"/"20_toy.ipynb", WRITE, "1 + 1", parameters=PARAMETERS)
    changed = runs.run_notebook("toy", dict(epochs=5), folder, say=lines.append)
    assert changed["again"] and changed["code_hash"] != first["code_hash"] and (project/"runs"/"a.previous"/"results.json").is_file()


def test_force_sets_the_earlier_run_aside(project, no_kernel):
    folder = project/"runs"/"a"
    runs.run_notebook("toy", {}, folder, say=lambda line: None)
    (folder/"checkpoint").write_text("old")
    runs.run_notebook("toy", dict(epochs=9), folder, force=True, say=lambda line: None)
    assert (project/"runs"/"a.previous"/"checkpoint").read_text() == "old" and not (folder/"checkpoint").exists()


def test_an_unfinished_run_is_continued(project, no_kernel):
    write_notebook(project/"nbs"/"21_steps.ipynb", "from pathlib import Path\nfrom shipnb.files import resolve\nmark = resolve(out) / 'checkpoint'",
                   "first = not mark.exists()\nmark.write_text('1')\nif first: raise RuntimeError('stopped in the middle')", parameters='out = ""  # folder')
    with pytest.raises(runs.NotebookFailed, match="stopped in the middle"):
        runs.run_notebook("steps", say=lambda line: None)
    record = runs.run_notebook("steps", say=lambda line: None)
    assert [o["status"] for o in record["attempts"]] == ["failed", "finished"] and "error" not in record


def test_a_folder_that_no_run_wrote_is_left_alone(project):
    (project/"mine").mkdir()
    (project/"mine"/"thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds files that no run wrote"): runs.run_notebook("toy", {}, project/"mine", force=True)
    assert [o.name for o in (project/"mine").iterdir() if o.name != ".lock"] == ["thesis.txt"]


def test_two_at_once_are_refused(project):
    with runs.file_lock(project/"runs"/"a"/".lock"), pytest.raises(BlockingIOError, match="another run is at work"):
        runs.run_notebook("toy", {}, project/"runs"/"a")


@pytest.mark.parametrize("source, code, message", [
    ("raise FileNotFoundError('the folder x is missing; give another')", 2, "the folder x is missing; give another \\(20_toy, cell 2; the notebook so far is"),
    ("1 / 0", 1, "20_toy, cell 2: ZeroDivisionError: division by zero"),
    ("import os; os._exit(3)", 1, "the kernel died")])
def test_a_failed_cell_is_one_sentence(project, source, code, message):
    write_notebook(project/"nbs"/"20_toy.ipynb", source, "print('never')", parameters=PARAMETERS)
    with pytest.raises(runs.NotebookFailed, match=message) as failure: runs.run_notebook("toy", {}, "runs/a", say=lambda line: None)
    assert failure.value.code == code and "\n" not in str(failure.value)
    saved = json.loads((project/"runs"/"a"/"20_toy.ipynb").read_text())
    assert [o["metadata"]["papermill"]["status"] for o in saved["cells"]][-2:] == ["failed", "pending"]
    assert json.loads((project/"runs"/"a"/"run.json").read_text())["status"] == "failed"


def test_the_export_cell_and_eval_false_cells_are_not_run(project):
    nb = write_notebook(project/"nbs"/"20_toy.ipynb", "#| eval: false\n1 / 0", "#| hide\nimport nbdev; nbdev.nbdev_export()", "6 * 7")
    runs.execute(nb, {}, project/"out.ipynb", project/"nbs")
    counts = [o["execution_count"] for o in json.loads((project/"out.ipynb").read_text())["cells"]]
    assert counts == [None, None, 1] and not (project/"shipnb").exists()


def test_a_full_disk_keeps_the_notebook_that_was_there(project, monkeypatch):
    (project/"out.ipynb").write_text("earlier")
    def full(path, data): raise OSError(errno.ENOSPC, "No space left on device", str(path))
    monkeypatch.setattr(runs, "atomic_write", full)
    with pytest.raises(OSError) as error: runs.execute(project/"nbs"/"20_toy.ipynb", {}, project/"out.ipynb", project/"nbs")
    assert runs._sentence(error.value) == (f"No space left on device: {project/'out.ipynb'}; free space or choose another folder", 1)
    assert (project/"out.ipynb").read_text() == "earlier"


# --- interrupting

SLOW = """import time
(folder := __import__("pathlib").Path(out)).joinpath("begun").touch()
try:
    for i in range(3000): time.sleep(0.1)
except KeyboardInterrupt:
    time.sleep(0.5)  # saving takes its time
    folder.joinpath("snapshot").write_text(str(i))
    {after}
"""
DEAF = """import time
__import__("pathlib").Path(out, "begun").touch()
while True:
    try: time.sleep(300)
    except KeyboardInterrupt: pass
"""
SLEEP = "import os, time\n__import__('pathlib').Path(out, 'begun').write_text(str(os.getpid()))\ntime.sleep(300)"
CELLS = dict(raises=SLOW.format(after="raise"), goes_on=SLOW.format(after="print('saved, going on')"), deaf=DEAF, killed=SLEEP)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory):
    """Four runs that take minutes, started at once so that the tests wait for them together: name to (process, run folder)."""
    folder, started = tmp_path_factory.mktemp("slow"), {}
    code = "import sys; from shipnb.runs import main; sys.exit(main())"
    for name, source in CELLS.items():
        write_notebook(folder/f"{name}.ipynb", source, "raise SystemError('a further cell ran')", parameters='out = ""  # folder')
        command = [sys.executable, "-c", code, "run", f"{name}.ipynb", "--out", f"runs/{name}"]
        started[name] = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), folder/"runs"/name
    yield started
    for process, _ in started.values(): process.kill()


def wait_until_begun(process, folder):
    end = time.monotonic() + TIMEOUT
    while not (folder/"begun").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the cell did not begin"
        time.sleep(0.05)
    time.sleep(0.3)


@pytest.mark.parametrize("name, number", [("raises", signal.SIGINT), ("goes_on", signal.SIGTERM)])
def test_a_signal_lets_the_cell_save(slow_runs, name, number):
    process, folder = slow_runs[name]
    wait_until_begun(process, folder)
    process.send_signal(number)
    said, complaint = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130 and "Traceback" not in complaint and "the same command continues it" in said
    assert int((folder/"snapshot").read_text()) >= 1
    assert json.loads((folder/"run.json").read_text())["status"] == "interrupted"
    states = [o["metadata"]["papermill"]["status"] for o in json.loads((folder/f"{name}.ipynb").read_text())["cells"]]
    assert states[-2:] == ["failed", "pending"]


def test_a_second_signal_stops_at_once(slow_runs):
    process, folder = slow_runs["deaf"]
    wait_until_begun(process, folder)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "one interrupt must leave the cell its time"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130


def test_after_sigkill_the_kernel_ends_the_lock_is_free_and_the_ledger_says_stopped(slow_runs):
    process, folder = slow_runs["killed"]
    wait_until_begun(process, folder)
    kernel = int((folder/"begun").read_text())
    assert [o["status"] for o in runs.ledger(folder.parent, "killed")] == ["running"]
    process.kill()
    process.communicate(timeout=TIMEOUT)
    assert [(o["name"], o["status"]) for o in runs.ledger(folder.parent, "killed")] == [("killed", "stopped")]
    end = time.monotonic() + TIMEOUT
    while _running(kernel):
        assert time.monotonic() < end, "the kernel outlived its parent"
        time.sleep(0.2)


def _running(pid):
    """Whether a process lives; one that has ended and waits to be collected does not."""
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False


# --- the study

CHAIN = (("03_eda", {}), ("20_training", {}), ("30_thresholds", {"model": "20_training"}), ("31_inference", {"model": "20_training"}))
HEAD = "import json\nfrom pathlib import Path\nfrom shipnb.files import resolve\nfolder = resolve(out)\n"
SCORES = dict(metrics=dict(dice_with_ships=0.7, dice=0.8, pixel_dice=0.75, object_f2=0.6, false_ship_share=0.1, threshold=0.5, min_area=12),
              nothing=dict(dice_with_ships=0.0, dice=0.5, pixel_dice=0.0, object_f2=0.5, false_ship_share=0.0))


@pytest.fixture
def study(project):
    """Four tiny notebooks that pass a model folder along."""
    nbs = project/"nbs"
    common = 'data = ""  # folder\nout = ""  # folder\nseed = 0  # whole number\n'
    write_notebook(nbs/"03_eda.ipynb", HEAD + "print('looked <b>at</b>', seed)", parameters=common)
    write_notebook(nbs/"20_training.ipynb", HEAD + "(folder/'model').mkdir(exist_ok=True)\n(folder/'model'/'card.json').write_text(json.dumps(dict(epochs=epochs)))",
                   parameters=common + "epochs = 2  # count\n")
    for name, result in (("30_thresholds", SCORES), ("31_inference", dict(ships=3))):
        write_notebook(nbs/f"{name}.ipynb", HEAD + f"card = json.loads((resolve(model)/'card.json').read_text())\n(folder/'results.json').write_text(json.dumps({result!r}))",
                       parameters=common + 'model = ""  # folder\n')
    return project


def states(records):
    return [o["again"] for o in records.values()]


def test_study_runs_the_chain_once(study):
    plan = lambda epochs="2": runs.study_plan("demo", pairs=[("training.epochs", epochs), ("seed", "7")])
    records, report = runs.run_study(plan(), say=lambda line: None)
    assert states(records) == [True] * 4 and all(o["parameters"]["seed"] == 7 for o in records.values())
    assert records["31_inference"]["parameters"]["model"] == "runs/demo/20_training/model"
    page = report.read_text()
    assert report == study/"runs"/"demo"/"report.html" and "looked &lt;b&gt;at&lt;/b&gt; 7" in page and "<td>0.700</td><td>0.000</td>" in page
    assert ("Dice with ships", "0.700", "0.000") in runs.study_table(records)
    assert states(runs.run_study(plan(), say=lambda line: None)[0]) == [False] * 4
    with pytest.raises(ValueError, match="epochs was 2, now 3"): runs.run_study(plan("3"), say=lambda line: None)


def test_a_new_training_makes_what_builds_on_it_stale(study, no_kernel):
    runs.run_study(runs.study_plan("demo"), say=lambda line: None)
    path = study/"nbs"/"20_training.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"].append(cell("1 + 1"))
    path.write_text(json.dumps(nb))
    assert states(runs.run_study(runs.study_plan("demo"), say=lambda line: None)[0]) == [False, True, True, True]


def test_study_refuses_before_it_runs(study):
    for bad, message in ((dict(pairs=[("training.epoch", "2")]), "unknown parameter epoch; did you mean epochs"), (dict(pairs=[("epoch", "2")]), "no notebook of the study has"),
                         (dict(pairs=[("inference2.seed", "2")]), "has no notebook inference2"), (dict(pairs=[("training.epochs", "two")]), "epochs = 'two' is of type str")):
        with pytest.raises(ValueError, match=message): runs.study_plan("demo", **bad)
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"): runs.study_plan("demo", data="nowhere")
    assert not (study/"runs").exists()


def test_study_parameter_files_flat_and_by_notebook(study):
    (study/"flat.yaml").write_text("# notebook: 20_training\nepochs: 5\n")
    (study/"by.yaml").write_text("training:\n  epochs: 6\nseed: 3\n")
    assert runs.study_plan(files=["flat.yaml"])[1].given == {"epochs": 5}
    plan = runs.study_plan(files=["by.yaml"])
    assert plan[1].given == {"epochs": 6, "seed": 3} and plan[0].given == {"seed": 3}


def test_changed_labels_are_a_new_run(study, no_kernel):
    (study/"mine").mkdir()
    (study/"mine"/"labels.csv").write_text("a")
    plan = lambda: runs.study_plan("demo", data="mine")[:1]
    runs.run_study(plan(), say=lambda line: None)
    assert states(runs.run_study(plan(), say=lambda line: None)[0]) == [False]
    (study/"mine"/"labels.csv").write_text("longer")
    assert states(runs.run_study(plan(), say=lambda line: None)[0]) == [True]


def test_estimates_prefer_the_ledger(study):
    step = runs.study_plan("demo", pairs=[("training.epochs", "4")])[1]
    past = lambda minutes, epochs: dict(notebook="20_training", status="finished", minutes=minutes, parameters=dict(data="", out="x", seed=0, epochs=epochs))
    assert runs.estimate_minutes(step, [])[0] == runs.MINUTES["20_training"]
    assert runs.estimate_minutes(step, [past(8, 1), past(2, 9)])[0] == 5
    assert runs.estimate_minutes(step, [past(8, 1), past(3, 4)])[0] == 3


# --- the report and the published notebooks

def test_report_escapes_and_needs_no_network(project):
    image = dict(output_type="display_data", data={"image/png": "aGk=", "text/plain": "fig"}, metadata={})
    bar = dict(output_type="display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "HBox()"}, metadata={})
    failure = dict(output_type="error", ename="ValueError", evalue="<x>", traceback=[])
    one = cell("a < b")
    one["outputs"] = [image, bar, failure, dict(output_type="stream", name="stdout", text="\x1b[31mred\x1b[0m & more")]
    nb = dict(cells=[cell("# Title & more", "markdown"), one, cell("#| hide\nsecret = 1")], metadata={}, nbformat=4, nbformat_minor=5)
    (project/"r.ipynb").write_text(json.dumps(nb))
    page = runs.report_html([project/"r.ipynb"], "t", [])
    assert "a &lt; b" in page and 'src="data:image/png;base64,aGk="' in page and "red &amp; more" in page and "ValueError: &lt;x&gt;" in page
    assert "HBox" not in page and "secret" not in page and "<script" not in page and "src=\"http" not in page


def test_refresh_stamps_cleans_and_refuses_machine_paths(project):
    path = write_notebook(project/"nbs"/"05_small.ipynb", "import sys, pathlib\nprint('x', file=sys.stdout)\nprint(' 40%|####', file=sys.stderr)\n"
                          "print(pathlib.Path('../data').resolve())", "plot = 6 * 7\nplot", parameters='out = ""  # folder')
    runs.refresh(path)
    nb = json.loads(path.read_text())
    assert nb["metadata"]["shipnb"] == {"hash": runs.cells_hash(path)} and nb["cells"][0]["metadata"] == {"tags": ["parameters"]}
    assert all(o["metadata"] == {} and o["execution_count"] is None for o in nb["cells"][1:])
    assert [o.get("name") for o in nb["cells"][1]["outputs"]] == ["stdout"] and "".join(nb["cells"][1]["outputs"][0]["text"]) == "x\ndata\n"
    before = write_notebook(path, "print('/'.join(['', 'home', 'me', 'secret']))", parameters='out = ""  # folder').read_text()
    with pytest.raises(ValueError, match="cell 2 names /home/me, a folder of this machine"): runs.refresh(path)
    assert path.read_text() == before


# --- the command line

def test_commands_answer_bad_input_with_one_sentence_and_code_2(project, capsys):
    (project/"p.yaml").write_text("- 1\n")
    (project/"file").write_text("in the way")
    for words, message in ((["run", "nothing"], "there is no notebook named nothing"), (["run", "toy", "-p", "epoch", "1"], "did you mean epochs"),
                           (["run", "toy", "-p", "epochs", "many"], "epochs = 'many' is of type str; allowed is int like 3"), (["run", "toy", "-p", "epochs"], "needs a name and a value"),
                           (["run", "toy", "-f", "p.yaml"], "must be a mapping"), (["run", "toy", "-f", "q.yaml"], "there is no parameter file q.yaml"),
                           (["run", "toy", "--out", "file"], "cannot be made: a file is in its way"), (["figures", "nothing"], "there is no notebook named")):
        assert runs.main(words) == 2, words
        complaint = capsys.readouterr().err
        assert message in complaint and complaint.count("\n") == 1 and complaint.startswith("shipnb: "), complaint


def test_usage_errors_have_code_2_and_help_has_examples(capsys):
    assert runs.main(["run"]) == 2 and runs.main(["fly"]) == 2
    capsys.readouterr()
    for command in ("sample", "run", "train", "study", "predict", "runs", "figures"):
        assert runs.main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert "Examples:" in text and f"shipnb {command}" in text.split("Examples:")[1]


def test_run_prints_its_folder_and_the_ledger_lists_it(project, no_kernel, capsys):
    assert runs.main(["run", "toy", "-p", "lr", "2e-3", "-p", "epochs", "10", "--out", "runs/one"]) == 0
    assert "runs/one: dice 0.02" in capsys.readouterr().out
    assert runs.main(["runs"]) == 0
    assert [o for o in capsys.readouterr().out.splitlines() if o.startswith("one") and "finished" in o and "dice 0.02" in o and "abc123" in o]
    assert runs.main(["runs", "--name", "two"]) == 0 and "no runs named two" in capsys.readouterr().out


def test_the_printed_command_is_the_run(project, capsys):
    """Given to a shell from another folder, it does what the run does, odd values included."""
    (project/"my file.yaml").write_text("sizes: [64]  # it's small\n")
    assert runs.main(["run", "toy", "-f", "my file.yaml", "-p", "lr", "0.25", "-p", "amp", "true", "--out", "runs/it's here", "--print"]) == 0
    command = capsys.readouterr().out.strip()
    assert "\n" not in command and command.startswith("mkdir -p ") and not (project/"runs").exists()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, cwd=project, env=environment, check=True, capture_output=True, timeout=TIMEOUT)
    assert json.loads((project/"runs"/"it's here"/"results.json").read_text())["values"] == [3, 0.25, True, [64]]


def test_dry_run_runs_nothing(study, capsys):
    assert runs.STUDY == CHAIN
    assert runs.main(["study", "--dry-run"]) == 0
    assert "nothing was run" in capsys.readouterr().out and not (study/"runs").exists()


def test_sample_passes_everything_on(project, monkeypatch, capsys):
    import types
    calls = []
    def make_fleet(root, **options):
        calls.append((root, options))
        return root
    fleet = types.SimpleNamespace(make_fleet=make_fleet, sample=lambda **options: make_fleet(project/"data"/"sample", **options))
    monkeypatch.setitem(sys.modules, "shipnb.fleet", fleet)
    monkeypatch.setattr("shipnb.fleet", fleet, raising=False)
    assert runs.main(["sample", "mine", "--images", "12", "--seed", "3", "--workers", "2"]) == 0 and runs.main(["sample"]) == 0
    assert calls == [(project/".mine.building", dict(images=12, seed=3, workers=2, progress=False)), (project/"data"/"sample", dict(images=240, seed=0, progress=False))]
    assert "12 images with labels are in mine" in capsys.readouterr().out


@pytest.mark.parametrize("bad, code", [([], 0), ([("b.jpg", "truncated")], 3)])
def test_predict_passes_everything_on_and_reports_bad_images(monkeypatch, capsys, bad, code):
    import types
    calls = []
    def predict_folder(*given, **options):
        calls.append((given, options))
        return types.SimpleNamespace(images=2, ships=5, bad=bad)
    monkeypatch.setitem(sys.modules, "shipnb.inference", types.SimpleNamespace(predict_folder=predict_folder))
    assert runs.main(["predict", "m1,m2", "photos", "-o", "s.csv", "--tta", "--strict", "--overlays", "look"]) == code
    (given, options), = calls
    assert given == (["m1", "m2"], "photos", "s.csv") and options["tta"] == "flips" and options["strict"] and options["overlays"] == "look"
    assert options["format"] == "csv" and options["sample_submission"] is None
    captured = capsys.readouterr()
    assert "5 ships" in captured.out and ("bad image b.jpg: truncated" in captured.err) == bool(bad)


def test_help_is_light():
    code = "import sys; from shipnb.runs import main; main(['--help']); print(sorted({'torch', 'papermill', 'pandas', 'nbformat'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    assert answer.stdout.splitlines()[-1] == "[]", answer.stderr


def test_debug_shows_the_traceback(project):
    ask = lambda **extra: subprocess.run([sys.executable, "-c", "import sys; from shipnb.runs import main; sys.exit(main())", "run", "nothing"],
                                         capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, **extra}, cwd=project)
    assert "Traceback" in ask(SHIPNB_DEBUG="1").stderr
    plain = ask()
    assert plain.returncode == 2 and "Traceback" not in plain.stderr
