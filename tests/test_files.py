"""Writing without loss: full disks, read-only folders, kills, concurrent builders."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from shipnb.files import atomic_path, atomic_write, build_once, file_lock, project_root, read_json, resolve, sha256_file, sha256_text, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    atomic_write(tmp_path/"a.txt", "old")
    with pytest.raises(RuntimeError):
        with atomic_path(tmp_path/"a.txt") as temp:
            temp.write_text("new")
            raise RuntimeError("interrupted")
    assert (tmp_path/"a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    atomic_write(tmp_path/"a.txt", "old")
    with pytest.raises(OSError, match="[Nn]o space"):
        with atomic_path(tmp_path/"a.txt"):
            with open("/dev/full", "w") as f: f.write("x" * 100_000)
    assert (tmp_path/"a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_files_get_the_ordinary_mode(tmp_path):
    atomic_write(tmp_path/"a.txt", b"x")
    (tmp_path/"b.txt").write_bytes(b"x")
    assert (tmp_path/"a.txt").stat().st_mode == (tmp_path/"b.txt").stat().st_mode


def test_json_round_trip_and_refusals(tmp_path):
    write_json(tmp_path/"a.json", {"a": [1, 2.5, None], "b": tmp_path})
    assert read_json(tmp_path/"a.json")["a"] == [1, 2.5, None]
    with pytest.raises(ValueError): write_json(tmp_path/"a.json", {"a": float("inf")})
    assert read_json(tmp_path/"a.json")["a"] == [1, 2.5, None]
    write_json(tmp_path/"b.json", {"a": float("nan"), "b": [np.float32("nan"), (1,)], "c": np.array([1, np.nan])})
    assert read_json(tmp_path/"b.json") == {"a": None, "b": [None, [1]], "c": [1, None]}
    (tmp_path/"bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json"): read_json(tmp_path/"bad.json")


def test_relative_paths_start_at_the_root(tmp_path, monkeypatch):
    (tmp_path/"settings.ini").write_text("")
    (tmp_path/"nbs").mkdir()
    for folder in (tmp_path, tmp_path/"nbs"):
        monkeypatch.chdir(folder)
        assert project_root() == tmp_path and resolve("runs/x") == tmp_path/"runs"/"x" and str(resolve("/etc")) == "/etc"


def test_build_once_rebuilds_only_on_another_key(tmp_path):
    made = []
    def make(temp): made.append(1); (temp/"n").write_text(str(len(made)))
    for key in ("a", "a", "b", "b"): build_once(tmp_path/"x", key, make)
    assert (tmp_path/"x"/"n").read_text() == "2" and len(made) == 2


def test_a_failed_rebuild_keeps_the_old_folder(tmp_path):
    build_once(tmp_path/"x", "a", lambda temp: (temp/"n").write_text("1"))
    def fail(temp): (temp/"n").write_text("half"); raise OSError(28, "No space left on device")
    with pytest.raises(OSError): build_once(tmp_path/"x", "b", fail)
    assert (tmp_path/"x"/"n").read_text() == "1"


def test_a_resumed_build_goes_on_and_another_key_begins_anew(tmp_path):
    def make(temp):
        done = len(list(temp.glob("epoch*")))
        (temp/f"epoch{done}").write_text("")
        if done < 2: raise KeyboardInterrupt
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt): build_once(tmp_path/"x", "a", make, resume=True)
    with pytest.raises(KeyboardInterrupt): build_once(tmp_path/"y", "a", make, resume=True)
    assert sorted(os.listdir(build_once(tmp_path/"x", "a", make, resume=True))) == [".built", "epoch0", "epoch1", "epoch2"]
    with pytest.raises(KeyboardInterrupt): build_once(tmp_path/"y", "b", make, resume=True)     # what was begun for "a" is gone
    assert sorted(os.listdir(tmp_path/".y.building")) == [".unfinished", "epoch0"]


def test_a_result_that_may_not_be_replaced(tmp_path):
    build_once(tmp_path/"x", "a", lambda temp: (temp/"n").write_text("1"), replace=False)
    assert build_once(tmp_path/"x", "a", None, replace=False) == tmp_path/"x"
    with pytest.raises(FileExistsError, match="already holds a; remove it or choose"): build_once(tmp_path/"x", "b", None, replace=False)


def test_killed_in_the_middle_leaves_nothing_that_looks_finished(tmp_path):
    code = f"from shipnb.files import build_once; import time\nbuild_once({str(tmp_path/'x')!r}, 'a', lambda t: ((t/'n').write_text('half'), print('go', flush=True), time.sleep(60)))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path/"x").exists()
    build_once(tmp_path/"x", "a", lambda temp: (temp/"n").write_text("whole"))
    assert (tmp_path/"x"/"n").read_text() == "whole"


def _slow_build(folder, count):
    def make(temp):
        with count.get_lock(): count.value += 1
        time.sleep(0.3)
        (temp/"n").write_text("1")
    build_once(folder, "a", make)


def test_two_builders_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    processes = [context.Process(target=_slow_build, args=(tmp_path/"x", count)) for _ in range(3)]
    for o in processes: o.start()
    for o in processes: o.join()
    assert count.value == 1


def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not made here"): build_once(tmp_path/"mine", "a", lambda temp: None)
    assert (tmp_path/"mine"/"thesis.tex").read_text() == "years of work"


def test_a_lock_is_exclusive_between_processes(tmp_path):
    code = f"from shipnb.files import file_lock\nwith file_lock({str(tmp_path/'l')!r}, wait=False): print('got it')"
    with file_lock(tmp_path/"l"):
        held = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    free = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert held.returncode and "another process is at work" in held.stderr and free.stdout == "got it\n"


def test_hashes(tmp_path):
    (tmp_path/"a").write_bytes(b"abc")
    want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"   # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path/"a") == sha256_text("abc") == want
