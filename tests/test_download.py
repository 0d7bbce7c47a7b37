"""Downloads from a local server that breaks connections, sends wrong bytes and ignores ranges."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data import download
from data.download import Downloader, unpack_safely
from utils import InputError, UserError


def packed(**files: bytes) -> bytes:
    """A .zip of some files; __ in a name stands for /."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).bytes(300_000)
FILES = {
    "annotations.csv": b"seriesuid,coordX,coordY,coordZ,diameter_mm\n",
    "seg-lungs-LUNA16.zip": packed(**{"seg-lungs-LUNA16__1.1.mhd": b"lungs"}),
    "evaluationScript.zip": packed(**{"evaluationScript__annotations__annotations_excluded.csv": b"excluded"}),
    "subset0.zip": packed(**{"subset0__1.1.mhd": b"header", "subset0__1.1.raw": NOISE}),
    "subset7.zip": packed(**{"subset7__1.7.mhd": b"other"}),
    "candidates.csv": b"not wanted",
}


class Server(ThreadingHTTPServer):
    """Serves both records. ``faults`` are used up one by one: {name: [fault, ...]}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges = True
        self.md5s: dict[str, str] = {}

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/api/records"

    def record(self, number: str) -> dict:
        names = [name for name in FILES if (name == "subset7.zip") == (number == download.RECORDS[1])]
        entries = []
        for name in names:
            digest = self.md5s.get(name, hashlib.md5(FILES[name]).hexdigest())
            link = {"self": f"{self.api}/{number}/files/{name}/content"}
            entries.append({"key": name, "size": len(FILES[name]), "checksum": f"md5:{digest}", "links": link})
        return {"files": entries}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        name = parts[4] if len(parts) > 4 else "record"
        fault = self.server.faults[name].pop(0) if self.server.faults.get(name) else ""
        wanted = self.headers.get("Range", "")
        self.server.requests.append((name, wanted))
        if fault.isdigit():
            self.send_error(int(fault))
            return
        body = json.dumps(self.server.record(parts[2])).encode() if name == "record" else FILES[name]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if fault == "wrong bytes":
            body = bytes(255 - byte for byte in body)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start - (fault == 'wrong range')}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        self.wfile.write({"break": rest[: len(rest) // 2], "nothing": b""}.get(fault, rest))

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server: Server, folder: Path, **options) -> dict[str, bytes]:
    """Downloads subset 0 unless other ones are asked for; {path: content} of all that is there then."""
    Downloader(folder, **{"subsets": [0], "api": server.api} | options).download()
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXPECTED = {
    "annotations.csv": FILES["annotations.csv"],
    "annotations_excluded.csv": b"excluded",
    "seg-lungs-LUNA16/1.1.mhd": b"lungs",
    "raw/subset0/1.1.mhd": b"header",
    "raw/subset0/1.1.raw": NOISE,
}


def without_notes(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if name != "archives/done.json"}


def test_files_are_put_where_preprocessing_looks_for_them(server, tmp_path, capsys):
    words = ["--subsets", "[0]", "--api", server.api, "--output_dir", str(tmp_path)]
    assert download.main(words) == 0
    assert "next, python preprocess.py" in capsys.readouterr().out
    assert without_notes(fetch(server, tmp_path)) == EXPECTED
    requests = len(server.requests)
    fetch(server, tmp_path)  # asks both records what there is, and nothing else
    assert server.requests[requests:] == [("record", "")] * 2
    assert "raw/subset7/1.7.mhd" in fetch(server, tmp_path, subsets=[0, 7])


@pytest.mark.parametrize("gone", ["annotations.csv", "annotations_excluded.csv", "seg-lungs-LUNA16", "raw/subset0"])
def test_what_was_deleted_comes_again(server, tmp_path, gone):
    fetch(server, tmp_path)
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert without_notes(fetch(server, tmp_path)) == EXPECTED


def test_archives_are_kept_where_they_are_asked_for(server, tmp_path):
    found = fetch(server, tmp_path, keep_archives=True)
    assert found["archives/subset0.zip"] == FILES["subset0.zip"]


def test_broken_connection_is_gone_on_with(server, tmp_path):
    server.faults = {"subset0.zip": ["break", "break", "503", "break"], "record": ["500"]}
    assert without_notes(fetch(server, tmp_path)) == EXPECTED
    starts = [wanted for name, wanted in server.requests if name == "subset0.zip"]
    half = len(FILES["subset0.zip"]) // 2
    assert starts[:2] == ["", f"bytes={half}-"] and len(set(starts)) == 4  # after the 503 the same again


def test_server_that_sends_nothing_more_ends_with_advice(server, tmp_path):
    server.faults = {"subset0.zip": ["break", *["nothing"] * download.TRIES]}
    with pytest.raises(UserError, match=r"subset0\.zip cannot be downloaded"):
        fetch(server, tmp_path)
    server.ranges, server.faults = False, {"subset0.zip": ["break"] * (download.TRIES + 1)}  # ever the same half
    with pytest.raises(UserError, match=r"subset0\.zip cannot be downloaded"):
        fetch(server, tmp_path)


def test_server_without_ranges_begins_anew(server, tmp_path):
    server.ranges, server.faults = False, {"subset0.zip": ["break"]}
    assert without_notes(fetch(server, tmp_path)) == EXPECTED


def test_server_that_sends_another_range_is_asked_again(server, tmp_path):
    server.faults = {"subset0.zip": ["break", "wrong range"]}
    assert without_notes(fetch(server, tmp_path)) == EXPECTED


def test_wrong_bytes_are_downloaded_anew_once(server, tmp_path):
    server.faults = {"subset0.zip": ["wrong bytes"]}
    assert without_notes(fetch(server, tmp_path)) == EXPECTED
    server.faults = {"subset7.zip": ["wrong bytes"] * 2}
    with pytest.raises(UserError, match=r"subset7\.zip came damaged twice; try again later, or download http"):
        fetch(server, tmp_path, subsets=[7])
    assert not (tmp_path / "raw" / "subset7").exists() and not list(tmp_path.rglob("*.part"))


def test_next_run_goes_on_with_what_an_interrupted_one_left(server, tmp_path):
    server.faults = {"subset0.zip": ["break", "404"]}
    with pytest.raises(UserError, match=r"cannot be downloaded .*404.*; the same command goes on later"):
        fetch(server, tmp_path)
    held = (tmp_path / "archives" / "subset0.zip.part").stat().st_size
    server.requests.clear()
    assert without_notes(fetch(server, tmp_path)) == EXPECTED
    assert ("subset0.zip", f"bytes={held}-") in server.requests
    assert [name for name, _ in server.requests].count("annotations.csv") == 0


def test_server_that_never_answers_ends_with_advice(server, tmp_path):
    server.faults = {"record": ["503"] * download.TRIES}
    with pytest.raises(UserError, match=r"cannot be downloaded .*503"):
        fetch(server, tmp_path)


def test_disk_that_is_too_small_is_told_before_anything_is_fetched(server, tmp_path, monkeypatch):
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"GB of disk, and .* name another output_dir, or fewer subsets"):
        fetch(server, tmp_path)
    assert {name for name, _ in server.requests} == {"record"}


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt", "C:/out.txt"])
def test_archive_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    (tmp_path / "a.zip").write_bytes(packed(**{"good.txt": b"", name: b"bad"}))
    with pytest.raises(InputError, match="would lead out of"):
        unpack_safely(tmp_path / "a.zip", tmp_path / "folder")
    assert not (tmp_path / "folder").exists() and not (tmp_path / "out.txt").exists()


def test_link_in_an_archive_is_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="would lead out of"):
        unpack_safely(tmp_path / "a.zip", tmp_path / "folder")


def test_damaged_archive_is_told(tmp_path):
    data = bytearray(packed(**{"a.txt": b"x" * 1000}))
    data[200] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be unpacked .*; delete it and run again"):
        unpack_safely(tmp_path / "a.zip", tmp_path / "folder")
    assert not list((tmp_path / "folder").rglob("*.txt"))


def test_record_without_a_file_is_told(server, tmp_path):
    with pytest.raises(InputError, match=r"the records 3723295 and 4121926 lack subset3\.zip; download them by hand"):
        fetch(server, tmp_path, subsets=[3])
    with pytest.raises(InputError, match="subsets must be among 0 to 9"):
        Downloader(tmp_path, subsets=[10])
