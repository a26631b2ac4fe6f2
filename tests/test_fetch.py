"""Fetching: hostile archives write nothing, and kagglehub's own code downloads from a local stand-in for kaggle.com."""
import hashlib
import http.server
import io
import json
import os
import re
import stat
import struct
import subprocess
import threading
import tracemalloc
import zipfile

import pytest

from shipnb import fetch, runs

kaggle_env = pytest.importorskip("kagglesdk.kaggle_env", reason="kagglehub is not installed (pip install 'shipnb[fetch]')")
FILES = {"train_v2/a.jpg": b"\xff\xd8 picture a" * 99, "train_v2/b.jpg": b"\xff\xd8 picture b" * 99, "labels.csv": b"ImageId,EncodedPixels\na.jpg,1 2\n"}


def zip_bytes(entries, method=zipfile.ZIP_STORED):
    """A ZIP of {name or ZipInfo: bytes}, or of pairs where a name is there twice."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", method) as z:
            for name, data in entries.items() if isinstance(entries, dict) else entries: z.writestr(name, data)
        return file.getvalue()


def entry(name, mode):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def tree(folder):
    """{path: bytes} of every file below a folder, links as what they point to."""
    return {p.relative_to(folder).as_posix(): b"-> " + bytes(p.readlink()) if p.is_symlink() else p.read_bytes() for p in folder.rglob("*") if p.is_symlink() or p.is_file()}


def quietly(call, *args):
    """Call with the warning about doubled names that zipfile gives when a test makes them."""
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args)


# --- archives

def test_what_is_unpacked_is_what_was_packed_and_sha256sum_agrees(tmp_path):
    (tmp_path/"a.zip").write_bytes(zip_bytes({"./train_v2/": b"", **FILES}, zipfile.ZIP_DEFLATED))
    sums = fetch.unpack(tmp_path/"a.zip", tmp_path/"out")
    found = tree(tmp_path/"out")
    found.pop(fetch.MANIFEST)
    assert found == FILES and sums == {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    assert subprocess.run(["sha256sum", "--strict", "--quiet", "-c", fetch.MANIFEST], cwd=tmp_path/"out").returncode == 0   # coreutils as oracle
    assert fetch.verify(tmp_path/"out") == fetch.verify(tmp_path/"out", read=False) == {}
    assert sorted(o.name for o in tmp_path.iterdir()) == ["a.zip", "out"]


def test_changes_are_found(tmp_path):
    (tmp_path/"a.zip").write_bytes(zip_bytes(FILES))
    fetch.unpack(tmp_path/"a.zip", tmp_path/"out")
    changed = bytearray(FILES["train_v2/a.jpg"])
    changed[500] ^= 1                                        # one bit, the same size
    (tmp_path/"out"/"train_v2"/"a.jpg").write_bytes(changed)
    (tmp_path/"out"/"notes.txt").write_text("mine")          # what was added is nobody's business
    assert fetch.verify(tmp_path/"out") == {"train_v2/a.jpg": "differs from what was fetched"}
    (tmp_path/"out"/"train_v2"/"b.jpg").write_bytes(b"short")  # another size: found without being asked to read
    assert set(fetch.verify(tmp_path/"out", read=False)) == {"train_v2/a.jpg", "train_v2/b.jpg"}
    (tmp_path/"out"/"labels.csv").unlink()
    assert fetch.verify(tmp_path/"out")["labels.csv"] == "is missing"


def test_a_damaged_list_of_checksums_is_told(tmp_path):
    (tmp_path/"a.zip").write_bytes(zip_bytes(FILES))
    fetch.unpack(tmp_path/"a.zip", tmp_path/"out")
    path = tmp_path/"out"/fetch.MANIFEST
    good = path.read_text()
    for bad in ("", good[:-20], good.replace("labels.csv", "../labels.csv"), "\n".join(good.splitlines()[:-1])):
        path.write_text(bad)
        with pytest.raises(ValueError, match="is damaged"): fetch.verify(tmp_path/"out")


HOSTILE = {
    "parent": ({"../../outside.txt": b"x"}, "leads out"),
    "parent inside": ({"a/../../outside.txt": b"x"}, "leads out"),
    "absolute": ({"/tmp/outside.txt": b"x"}, "leads out"),
    "drive": ({"C:/outside.txt": b"x"}, "leads out"),
    "backslash": ({"..\\outside.txt": b"x"}, "leads out"),
    "line break": ({"a\nb.txt": b"x"}, "leads out"),
    "empty name": ({"./": b"", ".": b"x"}, "leads out"),
    "long name": ({"x" * 300: b"x"}, "too long"),
    "link": ({entry("inside", stat.S_IFLNK | 0o777): b"/etc", "inside/passwd": b"x"}, "is a link"),
    "pipe": ({entry("pipe", stat.S_IFIFO | 0o644): b""}, "is a link or a device"),
    "twice": ([("a.txt", b"first"), ("./a.txt", b"second")], "there twice"),
    "case": ({"Train/a.jpg": b"1", "Train/A.JPG": b"2"}, "only in case"),
    "case of folders": ({"Train/a.jpg": b"1", "train/b.jpg": b"2"}, "one on some disks"),
    "accents": ({"caf\u00e9.jpg": b"1", "cafe\u0301.jpg": b"2"}, "only in case"),
    "file and folder": ({"a": b"1", "a/b": b"2"}, "a file and a folder"),
    "list of checksums": ({fetch.MANIFEST.upper(): b"0"}, "list of checksums"),
    "no file": ({"folder/": b""}, "holds no file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_write_nothing(case, tmp_path):
    entries, why = HOSTILE[case]
    pairs = list(entries.items() if isinstance(entries, dict) else entries)
    home = tmp_path/"deep"/"er"
    home.mkdir(parents=True)
    (home/"a.zip").write_bytes(quietly(zip_bytes, [("harmless.txt", b"x"), *pairs] if case != "no file" else pairs))
    before = tree(tmp_path)
    with pytest.raises(fetch.BadArchive, match=why) as error: fetch.unpack(home/"a.zip", home/"out")
    assert tree(tmp_path) == before and not (home/"out").exists() and "\n" not in str(error.value)


def test_a_nul_in_a_name_is_refused(tmp_path):
    data = zip_bytes({"harmless.txt": b"x", "a.jpg_.txt": b"y"}).replace(b"a.jpg_.txt", b"a.jpg\0.txt")   # zipfile cuts such a name at the NUL
    (tmp_path/"a.zip").write_bytes(data)
    with pytest.raises(fetch.BadArchive, match="leads out"): fetch.unpack(tmp_path/"a.zip", tmp_path/"out")
    assert [o.name for o in tmp_path.iterdir()] == ["a.zip"]


def test_bombs_are_refused(tmp_path):
    zeros = zip_bytes({f"{k}.csv": b"0" * 10**8 for k in range(2)}, zipfile.ZIP_DEFLATED)
    (tmp_path/"a.zip").write_bytes(zeros)
    with pytest.raises(fetch.BadArchive, match="times its size"): fetch.unpack(tmp_path/"a.zip", tmp_path/"out")
    with pytest.raises(fetch.BadArchive, match="GB are the most"): fetch.unpack(tmp_path/"a.zip", tmp_path/"out", max_bytes=10**8)
    with pytest.raises(fetch.BadArchive, match="1 are the most"): fetch.unpack(tmp_path/"a.zip", tmp_path/"out", max_files=1)
    assert [o.name for o in tmp_path.iterdir()] == ["a.zip"]


def test_a_bomb_that_lies_about_its_size_writes_nothing(tmp_path):
    data = bytearray(zip_bytes({"a.csv": b"0" * 10**7}, zipfile.ZIP_DEFLATED))
    for magic, place in ((b"PK\3\4", 22), (b"PK\1\2", 24)): struct.pack_into("<I", data, data.index(magic) + place, 10)   # ten bytes, it says
    (tmp_path/"a.zip").write_bytes(data)
    with pytest.raises(fetch.BadArchive, match="no whole ZIP"): fetch.unpack(tmp_path/"a.zip", tmp_path/"out")
    assert [o.name for o in tmp_path.iterdir()] == ["a.zip"]


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    """The overlapping bomb of D. Fifield, 2019 (A better zip bomb): many directory entries, one piece of data."""
    data = zip_bytes({"a.csv": b"0123456789" * 1000})
    start = data.index(b"PK\1\2")
    end = data.rindex(b"PK\5\6")
    copies = b"".join(data[start:end].replace(b"a.csv", b"%c.csv" % k) for k in b"bcdef")
    tail = bytearray(data[end:])
    struct.pack_into("<HHI", tail, 8, 6, 6, end - start + len(copies))
    (tmp_path/"a.zip").write_bytes(data[:end] + copies + tail)
    with pytest.raises(fetch.BadArchive, match="overlap"): fetch.unpack(tmp_path/"a.zip", tmp_path/"out")
    assert [o.name for o in tmp_path.iterdir()] == ["a.zip"]


def test_a_million_entries_are_refused_without_reading_them(tmp_path):
    """47 MB of directory, made by hand: the standard library needs 600 MB to read it."""
    one = zip_bytes({"000000": b""})
    head, end = one.index(b"PK\1\2"), one.rindex(b"PK\5\6")
    record = one[head:end]
    directory = b"".join(record.replace(b"000000", b"%06d" % k) for k in range(10**6))
    big = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 10**6, 10**6, len(directory), head)
    where = struct.pack("<4sIQI", b"PK\6\7", 0, head + len(directory), 1)
    (tmp_path/"a.zip").write_bytes(one[:head] + directory + big + where + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))
    tracemalloc.start()
    try:
        with pytest.raises(fetch.BadArchive, match="too many entries"): fetch.unpack(tmp_path/"a.zip", tmp_path/"out")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally: tracemalloc.stop()
    assert [o.name for o in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "flipped"])
def test_damaged_archives_write_nothing(damage, tmp_path):
    data = zip_bytes(FILES, zipfile.ZIP_DEFLATED)
    flipped = bytearray(data)
    flipped[45] ^= 255
    (tmp_path/"a.zip").write_bytes(dict(text=b"<html>not found</html>", empty=b"", cut=data[:-30], flipped=bytes(flipped))[damage])
    with pytest.raises(fetch.BadArchive, match="a.zip: is no whole ZIP archive"): fetch.unpack(tmp_path/"a.zip", tmp_path/"out")
    assert [o.name for o in tmp_path.iterdir()] == ["a.zip"]


def test_files_that_are_there_stay(tmp_path):
    (tmp_path/"a.zip").write_bytes(zip_bytes(FILES))
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"labels.csv").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds files"): fetch.unpack(tmp_path/"a.zip", tmp_path/"out")
    (tmp_path/"elsewhere").mkdir()
    (tmp_path/"link").symlink_to(tmp_path/"elsewhere")
    with pytest.raises(FileExistsError, match="is no folder"): fetch.unpack(tmp_path/"a.zip", tmp_path/"link")
    assert tree(tmp_path/"out") == {"labels.csv": b"mine"} and not tree(tmp_path/"elsewhere")


# --- kaggle.com on this machine

class Kaggle(http.server.BaseHTTPRequestHandler):
    """The three calls that a download makes, and the file store that they lead to (which knows ranges)."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.server.calls.append((self.path.rpartition("/")[2], asked.get("fileName")))
        if self.server.refuse: return self.send(self.server.refuse, b'{"message": "no"}', Content_Type="application/json")
        if self.path.endswith("/GetDataset"): return self.send(200, b'{"currentVersionNumber": 3}', Content_Type="application/json")
        return self.send(302, Location=f"/store/{asked.get('fileName') or 'archive.zip'}")

    def do_GET(self):
        name = self.path.removeprefix("/store/")
        data = self.server.archive if name == "archive.zip" else FILES[name]
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.server.calls.append(("GET", start))
        self.send_response(206 if start else 200)
        for key, value in {"Content-Length": len(data) - start, "Accept-Ranges": "bytes", "Content-Type": "application/zip"}.items(): self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(data[start:self.server.most])
        if self.server.most is not None: self.close_connection = True   # it breaks off


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A local kaggle.com, an account, and an empty project as working folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Kaggle)
    server.calls, server.refuse, server.most, server.archive = [], 0, None, zip_bytes(FILES)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02))
    thread.start()
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, f"http://127.0.0.1:{server.server_port}")
    for name, value in dict(KAGGLE_API_ENVIRONMENT="LOCALHOST", KAGGLE_API_TOKEN="token", NO_PROXY="127.0.0.1", HOME=str(tmp_path/"home")).items(): monkeypatch.setenv(name, value)
    (tmp_path/"project").mkdir()
    (tmp_path/"project"/"settings.ini").write_text("")
    monkeypatch.chdir(tmp_path/"project")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def outside(tmp_path):
    """What lies outside of the project's data folder, the empty lock files aside."""
    return sorted(o for o in tree(tmp_path) if not o.startswith("project/data/"))


@pytest.mark.parametrize("name", ["airbus", "oil-tanks"])
def test_fetch_downloads_once(name, kaggle, tmp_path, capsys):
    assert runs.main(["fetch", name]) == 0
    said = capsys.readouterr()
    assert said.out.endswith(f"{name} is in data/{name}\n") and "terms: " in said.err
    folder = tmp_path/"project"/"data"/name
    assert {k: v for k, v in tree(folder).items() if k != fetch.MANIFEST} == FILES
    assert sorted(o.name for o in folder.parent.iterdir()) == [f".{name}.lock", name] and outside(tmp_path) == ["project/settings.ini"]
    calls = len(kaggle.calls)
    assert runs.main(["fetch", name]) == 0 and len(kaggle.calls) == calls, "what is whole is not asked for again"
    assert "not fetched again" in capsys.readouterr().err
    assert runs.main(["fetch", name, "--check"]) == 0 and "all 3 files" in capsys.readouterr().out


def test_a_download_that_breaks_off_goes_on(kaggle, tmp_path, capsys):
    noise = os.urandom(3 * 2**20)
    kaggle.archive, kaggle.most = zip_bytes({**FILES, "noise.bin": noise}), 2 * 2**20 + 5000
    assert runs.main(["fetch", "airbus"]) == 1
    said = capsys.readouterr().err
    assert "it broke off" in said and "are kept in" in said and "Traceback" not in said
    assert not (tmp_path/"project"/"data"/"airbus").exists()
    kaggle.most, kaggle.calls[:] = None, []
    assert runs.main(["fetch", "airbus"]) == 0
    starts = [o for kind, o in kaggle.calls if kind == "GET"]
    assert starts[-1] == 2 * 2**20, "only the rest is downloaded (kagglehub writes by the MiB)"
    assert (tmp_path/"project"/"data"/"airbus"/"noise.bin").read_bytes() == noise
    assert fetch.verify("data/airbus") == {} and sorted(o.name for o in (tmp_path/"project"/"data").iterdir()) == [".airbus.lock", "airbus"]


@pytest.mark.parametrize("name, entries", [("parent", {"../outside.txt": b"x"}), ("absolute", {"/tmp/shipnb-outside.txt": b"x"})])
def test_a_hostile_download_leaves_nothing(name, entries, kaggle, tmp_path, capsys):
    kaggle.archive = zip_bytes({"harmless.txt": b"x", **entries})
    assert runs.main(["fetch", "airbus"]) == 2
    assert "leads out of the folder" in capsys.readouterr().err
    assert [o.name for o in (tmp_path/"project"/"data").iterdir()] == [".airbus.lock"] and outside(tmp_path) == ["project/settings.ini"]
    kaggle.archive = zip_bytes(FILES)
    assert runs.main(["fetch", "airbus"]) == 0, "the next attempt starts anew"


@pytest.mark.parametrize("status, code, words", [(401, 2, "accepted the rules at https://www.kaggle.com/c/airbus-ship-detection/rules"), (403, 2, "kaggle.com refuses airbus"),
                                                 (404, 2, "does not have airbus-ship-detection"), (500, 1, "error 500"), (429, 1, "again later")])
def test_what_kaggle_answers_is_one_sentence(status, code, words, kaggle, tmp_path, capsys):
    kaggle.refuse = status
    assert runs.main(["fetch", "airbus"]) == code
    said = capsys.readouterr().err.splitlines()
    assert words in said[-1] and all(o.startswith("shipnb: ") for o in said) and len(said) == 2
    assert [o.name for o in (tmp_path/"project"/"data").iterdir()] == [".airbus.lock"]


def test_without_an_account(kaggle, monkeypatch, capsys):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", "nowhere")
    monkeypatch.setattr(kaggle_env, "_get_access_token_from_file", lambda path: None)
    assert runs.main(["fetch", "airbus"]) == 2
    assert "needs a Kaggle account that accepted the rules" in capsys.readouterr().err and not kaggle.calls


@pytest.mark.parametrize("name", ["airbus", "oil-tanks"])
def test_without_a_network(name, kaggle, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, "http://127.0.0.1:9")   # nobody listens
    assert runs.main(["fetch", name]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "no connection to kaggle.com" in said[-1] and len(said) == 2
    assert [o.name for o in (tmp_path/"project"/"data").iterdir()] == [f".{name}.lock"]


def test_lost_files_are_put_back_and_others_stay(kaggle, tmp_path, capsys):
    assert runs.main(["fetch", "airbus"]) == 0
    folder = tmp_path/"project"/"data"/"airbus"
    (folder/"scenes.csv").write_text("mine")
    (folder/"train_v2"/"a.jpg").unlink()
    assert runs.main(["fetch", "airbus", "--check"]) == 1 and "train_v2/a.jpg is missing" in capsys.readouterr().err
    kaggle.calls.clear()
    assert runs.main(["fetch", "airbus"]) == 0
    assert [o for o in kaggle.calls if o[0] != "GET"] == [("DownloadDataFile", "train_v2/a.jpg")], "only what is missing is downloaded"
    assert {k: v for k, v in tree(folder).items() if k != fetch.MANIFEST} == {**FILES, "scenes.csv": b"mine"}
    (folder/"train_v2"/"b.jpg").write_bytes(b"mine as well")
    assert runs.main(["fetch", "airbus"]) == 2 and "differs from what was fetched" in capsys.readouterr().err
    assert (folder/"train_v2"/"b.jpg").read_bytes() == b"mine as well"


def test_another_version_at_kaggle_is_not_mixed_in(kaggle, tmp_path, capsys, monkeypatch):
    assert runs.main(["fetch", "airbus"]) == 0
    (tmp_path/"project"/"data"/"airbus"/"labels.csv").unlink()
    monkeypatch.setitem(FILES, "labels.csv", b"ImageId,EncodedPixels\nb.jpg,1 2\n")
    assert runs.main(["fetch", "airbus"]) == 2 and "no longer what it was" in capsys.readouterr().err
    assert not (tmp_path/"project"/"data"/"airbus"/"labels.csv").exists()


def test_a_folder_of_other_files_is_left_alone(kaggle, tmp_path, capsys):
    folder = tmp_path/"project"/"data"/"airbus"
    folder.mkdir(parents=True)
    (folder/"notes.txt").write_text("mine")
    assert runs.main(["fetch", "airbus"]) == 2 and "not fetched here" in capsys.readouterr().err
    assert runs.main(["fetch", "airbus", "--check"]) == 2
    assert tree(folder) == {"notes.txt": b"mine"} and not kaggle.calls


def test_an_archive_from_the_browser(kaggle, tmp_path, capsys):
    (tmp_path/"m.zip").write_bytes(zip_bytes(FILES))
    assert runs.main(["fetch", "masati"]) == 2 and "ask for the data with its form" in capsys.readouterr().err
    assert runs.main(["fetch", "masati", "--archive", str(tmp_path/"m.zip")]) == 0 and fetch.verify("data/masati") == {}
    assert runs.main(["fetch", "severstal", "airbus", "--archive", str(tmp_path/"m.zip")]) == 2
    assert runs.main(["fetch", "nothing"]) == 2 and "there are: airbus" in capsys.readouterr().err
    assert not kaggle.calls


def test_the_list(capsys):
    assert runs.main(["fetch"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in fetch.SOURCES) and "29 GB" in said


def test_kaggles_own_notebooks_have_it_mounted(kaggle, tmp_path, monkeypatch):
    import kagglehub
    (tmp_path/"input").mkdir()
    monkeypatch.setattr(kagglehub, "competition_download", lambda handle: str(tmp_path/"input"))
    assert fetch.fetch("airbus", say=lambda line: None) == tmp_path/"input"
    assert [o.name for o in (tmp_path/"project"/"data").iterdir()] == [".airbus.lock"]


def test_a_kagglehub_that_unpacks_otherwise_is_refused(kaggle, monkeypatch, capsys):
    from kagglehub import http_resolver
    monkeypatch.delattr(http_resolver, "_extract_archive")
    assert runs.main(["fetch", "airbus"]) == 1 and "kagglehub>=1.0.2" in capsys.readouterr().err and not kaggle.calls


def test_without_kagglehub(kaggle, monkeypatch, capsys):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    assert runs.main(["fetch", "airbus"]) == 1 and "pip install 'shipnb[fetch]'" in capsys.readouterr().err


def test_two_at_once(kaggle, tmp_path, capsys):
    from shipnb.files import file_lock
    with file_lock(tmp_path/"project"/"data"/".airbus.lock"):
        assert runs.main(["fetch", "airbus"]) == 2 and "another process is at work" in capsys.readouterr().err
