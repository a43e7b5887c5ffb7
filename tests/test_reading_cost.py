"""Proposition: the network is two files of at most 500 lines, whose `if`s the released model all takes, both ways.

None of them stands in a block's forward, and the README states what `tools/cost/reading_cost.py` measures.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

import minisvd
from tools.cost.reading_cost import If, ReadingCost, find_recipe, main, minisvd_unet, reading_cost
from tools.output import table_row

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PACKAGE = Path(minisvd.__file__).parent  # as installed, which need not be the checkout
MODEL = (PACKAGE / "attention.py", PACKAGE / "unet.py")
BRANCHES = ast.If | ast.IfExp | ast.Match | ast.While

measures = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 keeps no columns of instructions")

TOY = """from functools import partial
import torch


class Toy(torch.nn.Module):
    def __init__(self, wide=False):
        super().__init__()
        self.width = 2 if wide else 1

    def forward(self, x):
        if x.ndim == 9:
            x = x[0]
        elif x.ndim == 1:
            x = x * self.width
        return self.head(x)

    def head(self, x):
        return -x if x.ndim == 1 else x

    def unused(self, x):
        return x if x.ndim == 1 else -x


def recipe():
    return Toy, (torch.ones(3),)


def wide():
    return partial(Toy, wide=True), (torch.ones(3),)
"""


@pytest.fixture(scope="module")
def cost() -> ReadingCost:
    return reading_cost(minisvd_unet())


def branches_in_forwards(text: str) -> list[int]:
    """Lines of the branches that a file's forwards contain."""
    forwards = (f for f in ast.walk(ast.parse(text)) if isinstance(f, ast.FunctionDef) and f.name == "forward")
    return [node.lineno for forward in forwards for node in ast.walk(forward) if isinstance(node, BRANCHES)]


def test_no_branch_in_a_forward():
    assert [branches_in_forwards(file.read_text(encoding="utf-8")) for file in MODEL] == [[], []]
    assert branches_in_forwards(TOY) == [11, 13]  # control


@measures
def test_every_if_is_taken_both_ways(cost):
    assert cost.files == tuple(map(str, MODEL))
    in_the_files = [
        n for f in MODEL for n in ast.walk(ast.parse(f.read_text(encoding="utf-8"))) if isinstance(n, BRANCHES)
    ]
    assert len(cost.ifs) == len(in_the_files)  # so that none hides in a function that did not run
    assert [i for i in cost.ifs if not (i.taken and i.otherwise)] == []


@measures
def test_readme_states_the_measured_row(cost):
    (stated,) = re.findall(r"^\| minisvd \(SVD\).*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert stated == table_row(cost.row("minisvd (SVD)"))


@measures
def test_a_toy_counts_as_read_by_eye(tmp_path, monkeypatch, capsys):
    """Control: an `if` and a conditional expression that are never taken are found, on a line that runs or not."""
    file = tmp_path / "toy_of_reading_cost.py"
    file.write_text(TOY)
    monkeypatch.setattr(sys, "path", [*sys.path])
    recipe = find_recipe(f"{file}:recipe")
    found = reading_cost(recipe)
    expected = (
        If(str(file), 8, taken=False, otherwise=True),
        If(str(file), 11, taken=False, otherwise=True),
        If(str(file), 13, taken=True, otherwise=True),
        If(str(file), 18, taken=True, otherwise=False),
    )
    assert found == ReadingCost((str(file),), lines=29, lines_run=7, ifs=expected)
    assert found.row("toy") == ("toy", "1", "29", "7", "4", "2")

    with_torch = reading_cost(recipe, ("torch",))  # torch's own files count only when asked for
    assert set(found.files) < set(with_torch.files)

    (first, *_) = reading_cost(find_recipe(f"{file}:wide")).ifs
    assert (first.taken, first.otherwise) == (True, False)

    monkeypatch.setattr(sys, "argv", ["reading_cost.py", f"{file}:recipe"])
    main()
    assert capsys.readouterr().out.endswith(f"| {file}:recipe | 1 | 29 | 7 | 4 | 2 |\n")


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="recipe is 'gpt'"):
        find_recipe("gpt")
