"""The log files, TensorBoard read back by its own reader, and MLflow's calls."""
import json
import socket
import sys
import tempfile
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shipnb.logs import Board, draw_edges, forget_dead_boards, log_mlflow, read_lines


def test_images_and_histograms_are_what_tensorboard_reads(tmp_path):
    import torch
    from PIL import Image
    import io
    images = np.zeros((2, 8, 8, 3), np.uint8)
    truth, found = np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8), bool)
    truth[0, 1:6, 1:6], found[1, 2:7, 2:7] = 1, True
    board = Board(tmp_path)
    board.images("validation", images, truth, found, 3)
    board.histograms(torch.nn.Linear(4, 2), 3)
    board.close()
    read = EventAccumulator(str(tmp_path/"tensorboard"))
    read.Reload()
    img = np.array(Image.open(io.BytesIO(read.Images("validation")[0].encoded_image_string)))     # both images side by side
    one = img[:, :8] if img.shape[1] > img.shape[0] else img[:8]
    assert (one[1, 1] == (0, 255, 0)).all() and (one[3, 3] == 0).all()
    assert ((img == (255, 0, 255)).all(-1)).sum() == 16 and ((img == (0, 255, 0)).all(-1)).sum() == 16
    assert set(read.Tags()["histograms"]) == {"weight", "bias"} and read.Histograms("weight")[0].histogram_value.num == 8


@pytest.mark.parametrize("seed", range(20))
def test_edges_are_the_pixels_with_a_neighbour_outside(seed):
    mask = np.random.default_rng(seed).random((9, 11)) < 0.6
    drawn = draw_edges(np.zeros((9, 11, 3), np.uint8), mask, (1, 2, 3))[..., 0] == 1
    wide = np.pad(mask, 1)
    brute = np.array([[mask[y, x] and not wide[y:y + 3, x:x + 3].all() for x in range(11)] for y in range(9)])
    assert np.array_equal(drawn, brute)


def test_a_line_in_the_middle_that_is_no_json_is_an_error(tmp_path):
    (tmp_path/"log.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match="log.jsonl, line 2: no JSON"): read_lines(tmp_path/"log.jsonl")
    (tmp_path/"log.jsonl").write_text('{"a": 1}\n{"a": 2}')          # the last line without its newline may be cut
    assert read_lines(tmp_path/"log.jsonl")["a"].tolist() == [1]


def fake_mlflow(calls):
    """A module with the six functions that are used, which notes its calls."""
    module = types.ModuleType("mlflow")
    note = lambda name: lambda *args, **options: calls.append((name, args, options))
    for name in ("set_tracking_uri", "set_experiment", "log_params", "log_metrics", "log_artifacts"): setattr(module, name, note(name))
    class Run:
        info = types.SimpleNamespace(run_id="abc")
        def __enter__(self): return self
        def __exit__(self, *error): calls.append(("end", (), {}))
    module.start_run = lambda **options: (calls.append(("start", (), options)), Run())[1]
    return module


def test_mlflow_gets_every_row(tmp_path, monkeypatch):
    calls, run = [], tmp_path/"night"
    (run/"model").mkdir(parents=True)
    (run/"log.jsonl").write_text("".join(json.dumps(o) + "\n" for o in [dict(epoch=0, loss=0.5), dict(epoch=1, loss=0.25, dice=0.1)]))
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow(calls))
    assert log_mlflow(run, dict(lr=0.1), tracking_uri="file:x") == "abc"
    assert [o[0] for o in calls] == ["set_tracking_uri", "set_experiment", "start", "log_params", "log_metrics", "log_metrics", "log_artifacts", "end"]
    assert [(o[1][0], o[2]["step"]) for o in calls if o[0] == "log_metrics"] == [(dict(loss=0.5), 0), (dict(loss=0.25, dice=0.1), 1)]


def test_without_mlflow_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"pip install 'shipnb\[mlflow\]'"): log_mlflow(tmp_path, {})


def test_a_folder_without_a_log_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow([]))
    with pytest.raises(FileNotFoundError, match="nothing was trained there"): log_mlflow(tmp_path, {})


def test_only_boards_that_answer_are_remembered(tmp_path, monkeypatch):
    """A killed TensorBoard leaves its note behind; the next one for the same folder would be shown it."""
    from tensorboard import manager
    from tensorboard.version import VERSION
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with socket.socket() as server:
        server.bind(("localhost", 0))
        server.listen()
        port = server.getsockname()[1]
        manager.write_info_file(manager.TensorBoardInfo(version=VERSION, start_time=0, pid=1, port=port, path_prefix="", logdir=str(tmp_path), db="", cache_key="a"))
        (note,) = (tmp_path/".tensorboard-info").iterdir()
        note.rename(note.with_name("pid-1.info"))
        forget_dead_boards()
        assert [o.port for o in manager.get_all()] == [port]
    forget_dead_boards()
    assert manager.get_all() == []
