"""Downloads LUNA16 from its public records on Zenodo, and unpacks it where preprocess.py looks for it.

python data/download.py --subsets '[0,1]'

Part of a file that is there is gone on with; what is whole is not downloaded again. LUNA16 has terms of use of its own:
https://luna16.grand-challenge.org/Download/
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import logging
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.command_line import parse_command_line, run_main
from utils import (
    Progress,
    UserError,
    atomic_path,
    check,
    folder_lock,
    read_json,
    write_json,
)

logger = logging.getLogger(__name__)

RECORDS = ("3723295", "4121926")  # both parts of LUNA16
API = "https://zenodo.org/api/records"
TABLES = ("annotations.csv", "seg-lungs-LUNA16.zip", "evaluationScript.zip")
EXCLUDED = "annotations_excluded.csv"  # in the last one
BLOCK = 1 << 20
TIMEOUT_S = 60
TRIES = 8  # without a new byte
MOST_WAIT_S = 60
UNPACKED_SHARE = 2.0  # of an archive, at most as measured on single scans; told before anything is downloaded
MIB = 1 << 20
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
BROKEN = (OSError, http.client.HTTPException)  # connections; urllib's errors are OSErrors


@dataclass(frozen=True)
class RemoteFile:
    """A file of a record.

    Args:
        name: Its name.
        size: Bytes.
        md5: Checksum, as hexadecimal digits.
        url: Where it lies.
    """

    name: str
    size: int
    md5: str
    url: str


class Downloader:
    """Fetches subsets, annotations and lung masks of LUNA16.

    Args:
        output_dir: Where LUNA16 goes; preprocess.py looks in data/LUNA16.
        subsets: Subsets (0 to 9) to fetch, e.g. '[0,1]'; null fetches all ten.
        keep_archives: Keep each .zip after it is unpacked, in the folder archives.
        api: Address of the records, for a mirror.

    Raises:
        InputError: There is no such subset.
    """

    def __init__(
        self,
        output_dir: str | Path = "data/LUNA16",
        subsets: list[int] | None = None,
        keep_archives: bool = False,
        api: str = API,
    ) -> None:
        wanted = list(range(10)) if subsets is None else sorted(set(subsets))
        check(bool(wanted) and set(wanted) <= set(range(10)), f"subsets must be among 0 to 9, not {subsets}")
        self.output_dir, self.subsets, self.keep_archives = Path(output_dir), wanted, keep_archives
        self.api = api.rstrip("/")
        self.archives = self.output_dir / "archives"
        self._done_path = self.archives / "done.json"

    def download(self) -> None:
        """Fetches, verifies and unpacks all that is not there yet.

        Raises:
            UserError: The network or the server fails again and again, or a file comes damaged twice.
            InputError: The disk is too small, or a record lacks a file.
        """
        self.archives.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.archives, f"another download into {self.output_dir} is running"):
            files = self._list_files()
            done = read_json(self._done_path) if self._done_path.is_file() else {}
            todo = [file for file in files if done.get(file.name) != file.md5 or not self._is_there(file.name)]
            self._check_space(todo)
            for number, file in enumerate(todo, start=1):
                logger.info("%s: %d of %d files, %.1f GB", file.name, number, len(todo), file.size / 1e9)
                self._take(file)
                done[file.name] = file.md5
                write_json(self._done_path, done)

    def _is_there(self, name: str) -> bool:
        """Whether what came in a file still lies where it belongs."""
        scans, folder = self.output_dir / "raw", Path(name).stem
        if folder.startswith("subset"):
            return (scans / folder).is_dir() or any(scans.glob("*.mhd"))  # or all in one folder
        return (self.output_dir / {"evaluationScript": EXCLUDED}.get(folder, name.removesuffix(".zip"))).exists()

    def _list_files(self) -> list[RemoteFile]:
        """The wanted files of both records, as these state their sizes and checksums."""
        found: dict[str, RemoteFile] = {}
        for record in RECORDS:
            for entry in self._read_record(record).get("files", []):
                kind, _, digits = str(entry["checksum"]).partition(":")
                check(
                    kind == "md5", f"record {record} gives {kind!r} checksums of its files, not md5; download by hand"
                )
                url = entry.get("links", {}).get("self") or f"{self.api}/{record}/files/{entry['key']}/content"
                found[entry["key"]] = RemoteFile(entry["key"], int(entry["size"]), digits, url)
        wanted = [*TABLES, *(f"subset{number}.zip" for number in self.subsets)]
        missing = [name for name in wanted if name not in found]
        check(not missing, f"the records {' and '.join(RECORDS)} lack {', '.join(missing)}; download them by hand")
        return [found[name] for name in wanted]

    def _read_record(self, record: str) -> dict[str, Any]:
        """What a record says of itself."""
        url = f"{self.api}/{record}"
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                    return json.load(answer)
            except ValueError as error:
                raise UserError(f"{url} is no record of Zenodo ({error})") from error
            except BROKEN as error:
                self._wait(attempt, url, error)
        raise AssertionError  # the last wait raises

    def _check_space(self, todo: list[RemoteFile]) -> None:
        """Raises InputError where the disk cannot hold what is to come."""
        if not todo:
            logger.info("all of it is there already")
            return
        unpacked = sum(UNPACKED_SHARE * file.size for file in todo if file.name.endswith(".zip"))
        packed = [file.size for file in todo]
        needed = unpacked + (sum(packed) if self.keep_archives else max(packed))
        needed -= sum(path.stat().st_size for path in self.archives.glob("*.part"))
        free = shutil.disk_usage(self.archives).free
        logger.info("%.1f GB to download, about %.1f GB of disk", sum(packed) / 1e9, needed / 1e9)
        check(
            needed <= free,
            f"this takes about {needed / 1e9:.0f} GB of disk, and {self.output_dir} has {free / 1e9:.0f} GB; name "
            "another output_dir, or fewer subsets",
        )

    def _take(self, file: RemoteFile) -> None:
        """Fetches a file and puts it, or what is in it, where it belongs."""
        path = self._fetch(file)
        if not file.name.endswith(".zip"):
            path.replace(self.output_dir / file.name)
            return
        if file.name == "evaluationScript.zip":
            unpack_one(path, EXCLUDED, self.output_dir / EXCLUDED)
        else:
            unpack_safely(path, self.output_dir / "raw" if file.name.startswith("subset") else self.output_dir)
        if not self.keep_archives:
            path.unlink()

    def _fetch(self, file: RemoteFile) -> Path:
        """Path of the whole file; raises UserError where it comes damaged twice."""
        path = self.archives / file.name
        if path.is_file() and _md5(path) == file.md5:
            return path
        part = path.with_name(f"{path.name}.part")
        for _ in range(2):
            self._fetch_part(file, part)
            if _md5(part) == file.md5:
                part.replace(path)
                return path
            logger.warning("%s came damaged (its checksum is wrong), and is downloaded anew", file.name)
            part.unlink()
        raise UserError(f"{file.name} came damaged twice; try again later, or download {file.url} by hand")

    def _fetch_part(self, file: RemoteFile, part: Path) -> None:
        """Goes on with a partial file until it is as long as it should be."""
        part.touch()
        if part.stat().st_size > file.size:
            part.unlink()
            part.touch()
        attempt = 0
        with Progress(-(-(file.size - part.stat().st_size) // MIB), file.name, "MB") as progress:
            while (held := part.stat().st_size) < file.size:
                error: Exception = http.client.HTTPException("the server sends nothing more")
                try:
                    self._read_rest(file, part, held, progress)
                except BROKEN as broken:
                    if isinstance(broken, OSError) and broken.errno == errno.ENOSPC:  # the disk, not the network
                        raise
                    error = broken
                attempt = attempt + 1 if part.stat().st_size <= held else 0
                if attempt:
                    self._wait(attempt - 1, file.name, error)

    def _read_rest(self, file: RemoteFile, part: Path, held: int, progress: Progress) -> None:
        """Adds what comes to the partial file; a server that knows no ranges gives all of it from the start."""
        request = urllib.request.Request(file.url, headers={"Range": f"bytes={held}-"} if held else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            starts_at = _start_of(answer.headers.get("Content-Range", "")) if answer.status == 206 else 0
            if starts_at != held:
                if starts_at != 0:
                    raise http.client.HTTPException(f"the server sends bytes from {starts_at} on, not from {held}")
                logger.info("%s: the server begins anew", file.name)
            with open(part, "r+b") as target:
                target.truncate(starts_at)
                target.seek(starts_at)
                length = starts_at
                while length < file.size and (block := answer.read(min(BLOCK, file.size - length))):
                    target.write(block)
                    progress.advance(count=(length + len(block)) // MIB - length // MIB)
                    length += len(block)

    def _wait(self, attempt: int, what: str, error: BaseException) -> None:
        """Waits longer and longer before another try; raises UserError after the last one, or where none will help."""
        code = getattr(error, "code", None)
        is_final = code is not None and 400 <= code < 500 and code not in (408, 429)
        if is_final or attempt + 1 >= TRIES:
            raise UserError(
                f"{what} cannot be downloaded ({error}); the same command goes on later where it stopped"
            ) from error
        seconds = min(2**attempt, MOST_WAIT_S)
        logger.warning("%s: %s; trying again in %d s", what, error, seconds)
        time.sleep(seconds)


def _start_of(content_range: str) -> int:
    """First byte of an answer's Content-Range, e.g. 'bytes 100-199/200'; -1 where it does not say."""
    digits = content_range.partition(" ")[2].partition("-")[0]
    return int(digits) if digits.isdigit() else -1


def _md5(path: Path) -> str:
    """Checksum of a file."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def unpack_safely(archive: Path, folder: Path) -> None:
    """Unpacks a .zip of plain files; each is there whole or not at all.

    Raises:
        InputError: A name would lead out of the folder, or the disk is too small.
        UserError: The archive is damaged.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            for member in members:
                parts = PurePosixPath(member.filename.replace("\\", "/")).parts
                is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
                check(
                    bool(parts) and parts[0] != "/" and ".." not in parts and ":" not in parts[0] and not is_link,
                    f"{archive} holds {member.filename!r}, which would lead out of {folder}; it is not LUNA16's",
                )
            missing = [member for member in members if not _is_there(folder / member.filename, member.file_size)]
            needed, free = sum(member.file_size for member in missing), shutil.disk_usage(archive.parent).free
            check(needed <= free, f"{archive} takes {needed / 1e9:.1f} GB unpacked, and {free / 1e9:.1f} GB are free")
            with Progress(len(missing), f"unpacking {archive.name}", "file") as progress:
                for member in missing:
                    _write_member(file, member, folder / member.filename)
                    progress.advance()
    except DAMAGE as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); delete it and run again") from error


def unpack_one(archive: Path, name: str, target: Path) -> None:
    """Unpacks the one file of this name, wherever it lies in a .zip.

    Raises:
        InputError: It is not there.
        UserError: The archive is damaged.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if PurePosixPath(member.filename).name == name]
            check(bool(members), f"{archive} lacks {name}; download it by hand")
            _write_member(file, members[0], target)
    except DAMAGE as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); delete it and run again") from error


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_member(file: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Writes a file of an archive; its checksum is verified on the way."""
    with atomic_path(target) as temporary, file.open(member) as source, open(temporary, "wb") as sink:
        shutil.copyfileobj(source, sink, BLOCK)


def _command(argv: list[str] | None) -> int:
    (options, _), _ = parse_command_line(Downloader, "download", argv=argv)
    downloader = Downloader(**options)
    downloader.download()
    print(f"LUNA16 is in {downloader.output_dir}: next, python preprocess.py")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; the options are Downloader's arguments. Returns the exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
