"""The bench of scores and of ways to choose min_score."""

from __future__ import annotations

import sys
from pathlib import Path

from test_validate import examined

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from compare_scores import compare_choices


def test_choices_are_worth_at_most_what_is_possible():
    scans = [examined(10, (0.4 + 0.01 * number, 9, 9), (0.3, 4, 0)) for number in range(24)]
    scans += [examined(0, (0.2 + 0.01 * number, 5, 0)) for number in range(24)]
    table = compare_choices(scans, 24)
    dice = table["Dice of the others", "mean"]
    assert table.index.tolist() == ["as it is", "highest Dice", "best possible"]
    assert dice.max() == dice["best possible"] and dice.min() > 0.3
    assert table["chosen", "std"].gt(0).any()
