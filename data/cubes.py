"""Cuts cubes around LUNA16's nodules, with the masks that the radiologists of LIDC-IDRI drew.

python data/cubes.py --raw_data_dir data/LUNA16/raw --output_dir data/cubes
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd

from data.command_line import parse_command_line, run_main
from preprocess import Case, draw_contours, luna16_cases, read_contours, resample_mean
from utils import (
    Geometry,
    Progress,
    Vector,
    atomic_path,
    check,
    noting,
    read_scan,
    reason_of,
    sphere_diameter,
    write_csv,
)

logger = logging.getLogger(__name__)

CUBE_VOXELS = 51  # of 1 mm along each edge
LIMITS_HU = (-1200.0, 400.0)
COLUMNS = ("index", "patient_id", "seriesuid", "coordX", "coordY", "coordZ", "eq_diameter_mm")


class CubeMaker:
    """Writes ``lidc_nodules.npz`` and ``lidc_nodules.csv``.

    The former holds ``hu`` int16 and ``mask`` uint8, both (n, 51, 51, 51), with axes (z towards the head, y to the
    back, x to the left) and voxels of 1 mm; the latter a row a cube.

    Args:
        raw_data_dir: Folder of LUNA16's scans, or of some of them.
        annotations_path: LUNA16's annotations.csv.
        output_dir: Where the two files go.
        per_patient: Most nodules of one patient, the largest ones.
    """

    def __init__(
        self,
        raw_data_dir: str | Path = "data/LUNA16/raw",
        annotations_path: str | Path = "data/LUNA16/annotations.csv",
        output_dir: str | Path = "data/cubes",
        per_patient: int = 1,
    ) -> None:
        check(per_patient >= 1, f"per_patient must be at least 1, not {per_patient}")
        self.raw_data_dir, self.annotations_path = Path(raw_data_dir), Path(annotations_path)
        self.output_dir, self.per_patient = Path(output_dir), per_patient
        self.failed: dict[str, str] = {}  # {series UID: reason} of the last run

    def write(self) -> pd.DataFrame:
        """Writes both files; returns the table.

        Raises:
            ImportError: The radiologists' contours are not installed.
            FileNotFoundError: There is no scan, or no table.
            InputError: No nodule of the scans has contours.
        """
        read_contours("", Geometry((1, 1, 1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))  # says early what is missing
        cases = luna16_cases(self.raw_data_dir, self.annotations_path, None)
        rows, cubes, masks = [], [], []
        failed: dict[str, Exception] = {}
        with Progress(len(cases), "cutting cubes", "scan") as progress:
            for case in cases:
                with noting(failed, case.seriesuid):
                    for center, volume_mm3, hu, mask in cut_cubes(case):
                        diameter = round(sphere_diameter(volume_mm3), 2)
                        rows.append((case.patient, case.seriesuid, *center, diameter))
                        cubes.append(hu)
                        masks.append(mask)
                progress.advance()
        self.failed = {uid: reason_of(error) for uid, error in failed.items()}
        check(bool(rows), f"no nodule of {self.annotations_path} in {self.raw_data_dir} has contours")
        table = pd.DataFrame(rows, columns=list(COLUMNS[1:]))
        kept = self._largest(table)
        table = table.loc[kept].reset_index(drop=True).rename_axis("index").reset_index()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.output_dir / "lidc_nodules.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, hu=np.stack(cubes)[kept], mask=np.stack(masks)[kept])
        write_csv(self.output_dir / "lidc_nodules.csv", table)
        return table

    def _largest(self, table: pd.DataFrame) -> list[int]:
        """Rows of the largest nodules of each patient; a scan whose patient is unknown is one of its own."""
        owner = table["patient_id"].fillna(table["seriesuid"])
        order = table.assign(owner=owner).sort_values("eq_diameter_mm", ascending=False, kind="stable")
        return sorted(order.groupby("owner").head(self.per_patient).index.tolist())


def cut_cubes(case: Case) -> Iterator[tuple[Vector, int, np.ndarray, np.ndarray]]:
    """Of each nodule that has contours: centre (x, y, z) in mm, volume in mm³, and a cube around it.

    A cube is HU int16 and a mask uint8 (z, y, x), which shows all annotated nodules in it. A cube that reaches out of
    its scan, or that its own nodule reaches out of, is left out.
    """
    if not case.nodules:
        return
    scan = read_scan(case.scan_path)
    geometry = Geometry.from_image(scan)
    contours = read_contours(case.seriesuid, geometry)
    half = CUBE_VOXELS / 2
    for number, (x, y, z, _) in enumerate(case.nodules):
        center = (x, y, z)
        lower = np.subtract(center, half)
        if not geometry.contains(np.stack([lower, lower + CUBE_VOXELS])).all():
            continue
        grid = Geometry.covering(lower, lower + CUBE_VOXELS, shape_zyx=(CUBE_VOXELS,) * 3)
        drawn = [draw_contours(grid, geometry, contours, nodule[:3], nodule[3]) for nodule in case.nodules]
        voxels = drawn[number]
        if voxels is None or not len(voxels) or voxels.min() == 0 or voxels.max() == CUBE_VOXELS - 1:
            continue
        mask = np.zeros(grid.shape_zyx, np.uint8)
        for own in drawn:
            if own is not None:
                mask[tuple(own.T)] = 1
        hu = np.concatenate([values for _, values in resample_mean(scan, grid, LIMITS_HU[0], LIMITS_HU)])
        yield center, len(voxels), np.rint(hu).astype(np.int16), mask


def _command(argv: list[str] | None) -> int:
    (options, _), _ = parse_command_line(CubeMaker, "write", argv=argv)
    maker = CubeMaker(**options)
    table = maker.write()
    print(f"{len(table)} cubes of {table['seriesuid'].nunique()} scans in {maker.output_dir}")
    if maker.failed:
        print(f"{len(maker.failed)} scans could not be read, such as {next(iter(maker.failed))}; the log says why")
    return 1 if maker.failed else 0


def main(argv: list[str] | None = None) -> int:
    """Command line; the options are CubeMaker's arguments. Returns the exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
