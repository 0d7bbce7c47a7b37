"""The file formats of scans: MetaImage, NIfTI and NRRD; each reader refuses what ITK would let pass.

DICOM's reader is ``data/dicom.py``; ``utils.read_scan`` takes the one that accepts a path.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from utils import GZIP_MAGIC, InputError, ScanHeader, ScanReader, Shape, Vector, check, decode, first_bytes

SEGMENTATION = ".seg.nrrd"  # of 3D Slicer
# Of NRRD (teem.sourceforge.net/nrrd/format.html#space), those that say where left, back and up are.
ANATOMICAL_SPACES = (
    *("right-anterior-superior", "left-anterior-superior", "left-posterior-superior"),
    *("ras", "las", "lps"),
)
MAX_NIFTI_GAP = 0.1  # between a voxel's two places, in the header's unit
# By the length of a NIfTI header, formats and places of: dim, bitpix, pixdim, vox_offset, slope and intercept,
# qform_code and sform_code, quaternion and offset, sform (nifti.nimh.nih.gov: NIfTI-1, NIfTI-2).
NIFTI_PLACES = {
    348: (("8h", 40), ("h", 72), ("8f", 76), ("f", 108), ("2f", 112), ("2h", 252), ("6f", 256), ("12f", 280)),
    540: (("8q", 16), ("h", 14), ("8d", 104), ("q", 168), ("2d", 176), ("2i", 344), ("6d", 352), ("12d", 400)),
}


class MetaImageReader(ScanReader):
    """MetaImage: LUNA16's .mhd with the voxels in a .raw or .zraw file beside it, or .mha with both in one file.

    ITK takes 0 or 1 for fields that are absent, ignores checksums and fills up cut-off files: a damaged scan would pass
    silently.
    """

    suffixes = (".mhd", ".mha")
    image_io = "MetaImageIO"

    def advice(self, path: Path) -> str:
        """Of the file with the voxels."""
        is_data = path.name.lower().endswith((".raw", ".zraw"))
        return f"{path.name} holds the voxels alone; name the .mhd file beside it" if is_data else ""

    def files(self, path: Path) -> tuple[Path, ...]:
        """The header, and its ElementDataFile where that is another file; it must lie beside the header."""
        files = super().files(path)
        data = self._fields(path)[0]["ElementDataFile"]
        if data == "LOCAL":  # behind the header
            return files
        voxels = path.parent / data
        check(
            not Path(data).is_absolute() and ".." not in Path(data).parts and voxels.parent == path.parent,
            f"{path}: ElementDataFile must be one file beside the header, not {data!r}",
        )
        if not voxels.is_file():
            is_list = data.split()[0] == "LIST" or "%" in data
            check(not is_list, f"{path}: ElementDataFile must be one file, not a list ({data!r}); write it as one .mha")
            raise FileNotFoundError(f"{path} needs {voxels}, which does not exist; download both files")
        return (*files, voxels)

    def read_header(self, path: Path) -> ScanHeader:
        """Checks the fields that ITK replaces silently, too."""
        fields, _ = self._fields(path)
        origins, spacings = ("Offset", "Position", "Origin"), ("ElementSpacing", "ElementSize")
        for names, what in ((origins, "positions"), (spacings, "sizes")):
            check(
                any(name in fields for name in names),
                f"{path} has no {names[0]}: {what} in mm would be wrong; download the file again",
            )
        skipped = fields.get("HeaderSize", "0")
        check(
            skipped == "-1" or skipped.isdecimal(),
            f"{path}: HeaderSize must be a number of bytes, or -1 for all before the voxels, not {skipped!r}",
        )
        dimensions = fields.get("NDims", "")
        for name in (*origins, *spacings):
            values = fields.get(name, "").split()
            check(
                name not in fields or (str(len(values)) == dimensions and all(map(_is_finite, values))),
                f"{path}: {name} must be {dimensions} finite numbers, not {fields.get(name)!r}",
            )
        return super().read_header(path)

    def check_voxels(self, path: Path, expected: int) -> None:
        """The size must be right to the byte, and so must the checksum of compressed voxels."""
        super().check_voxels(path, expected)
        fields, length = self._fields(path)
        *headers, file = self.files(path)
        size, skipped = file.stat().st_size, fields.get("HeaderSize", "0")
        start = length if not headers else max(size - expected, 0) if skipped == "-1" else int(skipped)
        if fields.get("CompressedData", "False").lower() == "true":
            check(start == 0 or not headers, f"{path}: compressed voxels must not have a HeaderSize")
            held = _inflated_size(file, start, expected)
        else:
            held = size - start
        check(held == expected, _wrong_size(path, expected, file, held))

    def _fields(self, path: Path) -> tuple[dict[str, str], int]:
        """Fields of the header (an .mhd, or the text at the start of an .mha), and its length in bytes."""
        fields, length = {}, 0
        for line in first_bytes(path).split(b"\n"):
            length += len(line) + 1
            name, equals, value = decode(line).partition("=")
            if not equals:  # MetaIO would take a colon, too, and read on
                break
            fields[name.strip()] = value.strip()
            if name.strip() == "ElementDataFile":
                return fields, length
        raise InputError(
            f"{path} is no MetaImage header: its lines must be 'name = value' and end with ElementDataFile"
        )


@dataclass(frozen=True)
class NiftiHeader:
    """The fields of a NIfTI header that say where the voxels are, and how they are stored.

    Args:
        voxel_bytes: Bytes of one stored voxel.
        start: Where the voxels begin in the file, once it is inflated.
        slope: Stored values times this ...
        intercept: ... plus this are the scan's; a slope of 0 means the stored values themselves.
        pixdim: Spacing (i, j, k), in the header's unit.
        qform: (3, 4) affine by quaternion and ``pixdim``, to RAS; None where the header says that it has none.
        sform: (3, 4) affine given in full; None likewise.
        size: Voxels along (i, j, k).
    """

    voxel_bytes: int
    start: int
    slope: float
    intercept: float
    pixdim: Vector
    qform: np.ndarray | None
    sform: np.ndarray | None
    size: Shape

    @classmethod
    def read(cls, path: Path) -> NiftiHeader:
        """Reads the header of a file, compressed or not.

        Raises:
            InputError: It is no NIfTI header, or cannot be inflated.
        """
        data = first_bytes(path)
        if data[:2] == GZIP_MAGIC:
            check(path.name.lower().endswith(".gz"), f"{path} is compressed; name it .nii.gz")
            try:
                with gzip.open(path) as file:
                    data = file.read(max(NIFTI_PLACES))
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{path} is damaged ({error}); download it again") from error
        order = "<" if struct.unpack_from("<i", data.ljust(4))[0] in NIFTI_PLACES else ">"
        (size,) = struct.unpack_from(f"{order}i", data.ljust(4))
        check(
            size in NIFTI_PLACES and len(data) >= size,
            f"{path} has no readable header of NIfTI; copy or download it again",
        )
        values = [struct.unpack_from(order + form, data, place) for form, place in NIFTI_PLACES[size]]
        dim, (bits,), pixdim, (start,), (slope, intercept), codes, quaternion, rows = values
        return cls(
            voxel_bytes=bits // 8,
            start=max(int(start), size + 4),
            slope=slope,
            intercept=intercept,
            pixdim=pixdim[1:4],
            qform=_affine_of(quaternion, pixdim) if codes[0] > 0 else None,
            sform=np.reshape(rows, (3, 4)) if codes[1] > 0 else None,
            size=dim[1:4],
        )


def _affine_of(quaternion: Sequence[float], pixdim: Sequence[float]) -> np.ndarray:
    """(3, 4) affine of NIfTI's b, c, d and offset, by its definition."""
    b, c, d, *offset = quaternion
    a = math.sqrt(max(1 - b * b - c * c - d * d, 0))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    steps = np.asarray(pixdim[1:4]) * [1, 1, -1 if pixdim[0] < 0 else 1]
    return np.column_stack([rotation * steps, offset])


class NiftiReader(ScanReader):
    """NIfTI in one file, compressed or not.

    ITK takes the origin for 0 where no position is stated, one of two affines that disagree, and a spacing of 1 for 0.
    """

    suffixes = (".nii", ".nii.gz")
    image_io = "NiftiImageIO"

    def read_header(self, path: Path) -> ScanHeader:
        """Checks that the header states one place for each voxel."""
        own = NiftiHeader.read(path)
        self._check_places(path, own)
        return ScanHeader(super().read_header(path).geometry, own.voxel_bytes)

    def _check_places(self, path: Path, header: NiftiHeader) -> None:
        """Raises InputError where positions in mm would be a guess."""
        check(
            all(map(math.isfinite, header.pixdim)) and min(header.pixdim) > 0,
            f"{path}: pixdim must be three positive voxel sizes, not {list(header.pixdim)}; write it from its source",
        )
        affines = [affine for affine in (header.qform, header.sform) if affine is not None]
        check(
            bool(affines),
            f"{path} does not say where its voxels lie (qform_code and sform_code are 0): positions in mm would be a "
            "guess; convert the scan from its source again (dcm2niix sets them), or set a code that you know is right",
        )
        corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*np.subtract(header.size, 1), 1]
        apart = float(np.abs(corners @ (affines[0] - affines[-1]).T).max())
        check(
            apart <= MAX_NIFTI_GAP,
            f"{path}: qform and sform put the same voxel {apart:.1f} units apart; set both to the one that is right "
            "(nibabel: image.set_qform(affine, 1); image.set_sform(affine, 1))",
        )
        steps = np.linalg.norm(affines[-1][:, :3], axis=0)
        check(
            np.allclose(steps, header.pixdim, rtol=1e-2),
            f"{path}: its sform has voxels of {np.round(steps, 4).tolist()}, its pixdim {list(header.pixdim)}; "
            "convert it from its source again",
        )
        cosines = affines[-1][:, :3] / steps
        check(
            np.allclose(cosines.T @ cosines, np.eye(3), atol=1e-3),
            f"{path}: its axes are not at right angles; resample it to a grid whose axes are, e.g. in 3D Slicer "
            "(Resample Scalar Volume)",
        )

    def check_voxels(self, path: Path, expected: int) -> None:
        """The file may hold more than the voxels, such as extensions of the header."""
        super().check_voxels(path, expected)
        size, is_compressed = path.stat().st_size, first_bytes(path)[:2] == GZIP_MAGIC
        held = _inflated_size(path, 0, expected + size) if is_compressed else size
        held -= NiftiHeader.read(path).start
        check(held >= expected, _wrong_size(path, expected, path, held))

    def read_image(self, path: Path) -> sitk.Image:
        """Values after slope and intercept, but for a slope of 0: by the standard it means none, for ITK it means 1."""
        image, header = super().read_image(path), NiftiHeader.read(path)
        if header.slope == 0 and math.isfinite(header.intercept) and header.intercept:
            return image - header.intercept
        return image


class NrrdReader(ScanReader):
    """NRRD in one file.

    ITK takes 1 and 0 for spacings and an origin that are absent, and ignores checksums.
    """

    suffixes = (".nrrd",)
    image_io = "NrrdImageIO"

    def search(self, paths: Iterable[Path]) -> list[Path]:
        """A segmentation of 3D Slicer is no scan."""
        return [path for path in super().search(paths) if not path.name.lower().endswith(SEGMENTATION)]

    def read_header(self, path: Path) -> ScanHeader:
        """Refuses a header whose voxels lie in another file, or at no stated place."""
        self.check_place(path)
        return super().read_header(path)

    def check_place(self, path: Path) -> None:
        """Raises InputError where the voxels lie in another file, or at no stated place."""
        check(first_bytes(path)[:4] == b"NRRD", f"{path} has no readable header of NRRD; copy or download it again")
        fields, _ = self._fields(path)
        check(
            "data file" not in fields and "datafile" not in fields,
            f"{path} keeps its voxels in another file; convert it to one self-contained .nrrd",
        )
        missing = [name for name in ("space", "space directions", "space origin") if name not in fields]
        units = ", ".join(sorted({unit.lower() for unit in re.findall(r'"([^"]+)"', fields.get("space units", ""))}))
        check(units in ("", "mm"), f"{path} measures in {units}, not mm; convert it to mm")
        check(
            not missing,
            f"{path} has no {' and no '.join(missing)}: positions in mm would be a guess; convert it from its source "
            "again, or add the fields that you know",
        )
        space = fields["space"].lower()
        check(
            space in ANATOMICAL_SPACES,
            f"{path} has the space {fields['space']!r}, which does not say where left and right are; convert it from "
            "its source again, or write the space that you know, such as left-posterior-superior",
        )

    def check_voxels(self, path: Path, expected: int) -> None:
        """The checksum of compressed voxels must be right; ITK checks the size of others itself."""
        super().check_voxels(path, expected)
        fields, start = self._fields(path)
        if fields.get("encoding", "raw").lower() in ("gzip", "gz"):
            held = _inflated_size(path, start, expected)
            check(held == expected, _wrong_size(path, expected, path, held))

    def _fields(self, path: Path) -> tuple[dict[str, str], int]:
        """Fields of the header, in lower case, and its length in bytes."""
        fields, length = {}, 0
        for line in first_bytes(path).split(b"\n"):
            length += len(line) + 1
            if not line.strip():
                break
            name, colon, value = decode(line).partition(":")
            if colon and not value.startswith("="):  # := stands before a comment of the writer
                fields[name.strip().lower()] = value.strip()
        return fields, length


def _is_finite(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _wrong_size(path: Path, expected: int, file: Path, held: int) -> str:
    remedy = "download it again" if held < expected else "is the header another scan's? correct it or download both"
    return f"{path}: the header needs {expected:,} bytes of voxels but {file.name} holds {held:,}; {remedy}"


def _inflated_size(path: Path, start: int, limit: int) -> int:
    """Bytes in a zlib or gzip stream, whose checksums are verified; stops early above ``limit``.

    A gzip may have several members, one after the other, and zeros behind them.
    """
    decoder, size = zlib.decompressobj(wbits=47), 0  # 47: zlib or gzip, whichever the header says
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while (block := file.read(1 << 20)) and size <= limit:
                while block:
                    size += len(decoder.decompress(block))
                    block = decoder.unused_data.lstrip(b"\0") if decoder.eof else b""
                    if block:
                        decoder = zlib.decompressobj(wbits=31)
    except zlib.error as error:
        raise InputError(f"{path} is damaged ({error}); download it again") from error
    if size <= limit and not decoder.eof:
        raise InputError(f"{path} is cut off after {size:,} bytes of voxels; download it again")
    return size
