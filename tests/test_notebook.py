"""Theorem: the notebook is its script, and every claim in it holds when it is run, in less than four minutes."""

import json
import time
from pathlib import Path

import pytest

from tools.teach import notebook

FOLDER = Path(notebook.__file__).parent
SHOWN = FOLDER / "svd.ipynb"


def test_the_notebook_is_made_of_the_script_and_has_no_outputs(tmp_path):
    made = tmp_path / "made.ipynb"
    notebook.main(["-o", str(made)])
    assert made.read_text(encoding="utf-8") == SHOWN.read_text(encoding="utf-8")
    cells = json.loads(made.read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
    script = notebook.SOURCE.read_text(encoding="utf-8")
    assert len(cells) == script.count("\n# %%") + 1
    assert {cell["cell_type"] for cell in cells} == {"code", "markdown"}
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert sorted(filter(None, code.splitlines())) == sorted(
        line for line in script.splitlines() if line and not line.startswith("# ") and line not in ("#", "# %%")
    )


@pytest.mark.slow
def test_every_claim_in_it_holds():
    """Run as Jupyter runs it, from the notebook's own folder. What a cell claims it asserts. Control: a false claim in
    a last cell, the only one that fails.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    book = nbformat.read(SHOWN, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert sum(cell.source.count("assert ") for cell in code) >= 30
    first = code[2]
    assert "assert sigmas[-1] == 0" in first.source
    book.cells.append(nbformat.v4.new_code_cell(first.source.replace("sigmas[-1] == 0", "sigmas[-1] == 1")))
    began = time.perf_counter()
    with pytest.raises(CellExecutionError, match="AssertionError"):
        NotebookClient(book, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    *claims, control = (cell for cell in book.cells if cell.cell_type == "code")
    assert claims == code
    assert all(cell.execution_count for cell in [*claims, control])
    errors = [[o for o in cell.outputs if o.output_type == "error"] for cell in [*claims, control]]
    assert [len(each) for each in errors] == [0] * len(claims) + [1]
    print(f"{time.perf_counter() - began:.0f} seconds")
    said = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "14 of 14 sites are trivial" in said
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 7
