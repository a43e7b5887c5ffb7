"""Proposition: each of the ten exercises has a checker that the given code fails and a right solution passes."""

import re
from pathlib import Path

import pytest

import teach_solutions
from tools.teach import check, exercises

NAMES = list(check.CHECKERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_checker_fails_what_is_given_and_passes_a_solution(name):
    with pytest.raises(check.Wrong) as told:
        check.CHECKERS[name](exercises)
    print(f"{name}: {told.value}")
    assert len(str(told.value).split()) > 5
    check.CHECKERS[name](teach_solutions)


def test_the_page_has_all_ten_in_their_order():
    page = Path("tools/teach/README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\*\*(\d+)\. `(\w+)`", page, flags=re.M) == [(str(i), n) for i, n in enumerate(NAMES, start=1)]
    said = [getattr(exercises, name).__doc__ for name in NAMES]
    assert [text.split(".")[0] for text in said] == [str(i) for i in range(1, 11)]


def test_the_command_says_what_is_solved_and_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A file with one solution of ten, and with a function that breaks."""
    mine = tmp_path / "mine.py"
    text = Path(exercises.__file__).read_text(encoding="utf-8")
    text = text.replace("    return embedding\n", "    return embedding / 2\n").replace(
        "linspace(700", "linspace(no_such"
    )
    mine.write_text(text, encoding="utf-8")
    assert check.main([str(mine)]) == 9
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert [line.split()[1] for line in lines if line.endswith(" solved")] == ["shared_key"]
    assert "NameError" in lines[7]
    with pytest.raises(FileNotFoundError, match=r"copy tools/teach/exercises\.py"):
        check.main([str(tmp_path / "none.py")])
