"""Make the notebook of svd.py, in which every cell begins with a line `# %%`, those of text with `# %% [markdown]`.

python -m tools.teach.notebook                  writes tools/teach/svd.ipynb, without outputs
"""

import argparse
import re
from pathlib import Path
from typing import Any

from tools.output import write_json

SOURCE = Path(__file__).with_name("svd.py")


def cells(script: str) -> list[dict[str, Any]]:
    """The cells of a script, in notebook format 4.5."""
    found = re.findall(r"^# %%( \[markdown\])?\n(.*?)\n*(?=^# %%|\Z)", script, re.MULTILINE | re.DOTALL)
    made = []
    for i, (text, source) in enumerate(found):
        lines = re.sub(r"^# ?", "", source, flags=re.MULTILINE) if text else source
        cell = {"cell_type": "markdown" if text else "code", "id": f"cell-{i}", "metadata": {}}
        code = {} if text else {"execution_count": None, "outputs": []}
        made.append({**cell, **code, "source": lines.splitlines(keepends=True)})
    return made


def notebook(script: str) -> dict[str, Any]:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells(script), "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.teach.notebook", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("tools/teach/svd.ipynb"), help="default: %(default)s")
    args = parser.parse_args(argv)
    write_json(args.out, notebook(SOURCE.read_text(encoding="utf-8")))
    print(args.out)


if __name__ == "__main__":
    main()
