"""Files for 3D Slicer, read back by other libraries than wrote them."""

import json

import nrrd
import numpy as np

from data.masks import read_mask
from data.slicer import write_points, write_segmentation
from utils import Geometry, Nodule

GRID = Geometry((10, 12, 14), (-20.0, 5.0, 100.0), (0.5, 0.75, 2.0), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))


def test_segmentation_has_its_names_colours_and_place(tmp_path):
    labels = np.zeros(GRID.shape_zyx, np.int32)
    labels[2:4, 3:6, 4:8], labels[6, 9, 10] = 1, 2
    write_segmentation(tmp_path / "a.seg.nrrd", labels, GRID, ["first", "second"])
    array, header = nrrd.read(str(tmp_path / "a.seg.nrrd"))
    assert header["space"] == "left-posterior-superior"
    assert (header["Segment0_Name"], header["Segment1_LabelValue"]) == ("first", "2")
    assert len(header["Segment0_Color"].split()) == 3 and header["Segment0_Color"] != header["Segment1_Color"]
    assert header["Segment0_Extent"] == "0 3 0 2 0 1" and header["Segment1_Extent"] == "6 6 6 6 4 4"
    assert header["Segmentation_ReferenceImageExtentOffset"] == "4 3 2"
    np.testing.assert_array_equal(array.T, labels[2:7, 3:10, 4:11])
    np.testing.assert_allclose(header["space origin"], GRID.world((2, 3, 4)))
    np.testing.assert_allclose(header["space directions"], np.diag([-0.5, -0.75, 2.0]))
    first, second = read_mask(tmp_path / "a.seg.nrrd").segments  # and by this project
    assert (first.name, second.name, int(first.inside.sum())) == ("first", "second", 24)


def test_points_lie_at_the_nodules_in_lps(tmp_path):
    nodules = [Nodule((1.5, -2.25, 3.0), (0.0, 0.0, 0.0), 6.0), Nodule((10.0, 20.0, 30.0), (0.0, 0.0, 0.0), 8.0)]
    write_points(tmp_path / "a.mrk.json", nodules, ["first", "second"])
    (markups,) = json.loads((tmp_path / "a.mrk.json").read_text())["markups"]
    assert (markups["type"], markups["coordinateSystem"]) == ("Fiducial", "LPS")
    points = [(point["label"], point["position"]) for point in markups["controlPoints"]]
    assert points == [("first", [1.5, -2.25, 3.0]), ("second", [10.0, 20.0, 30.0])]
