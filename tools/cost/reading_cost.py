"""What reading a model costs: its files, their lines, the lines that run, its `if`s and the `if`s never taken.

    python -m tools.cost.reading_cost                                       minisvd's UNet and diffusers', as table rows
    python -m tools.cost.reading_cost model.py:recipe --package mypackage   any other: recipe() -> (build, inputs)

The model is built and run forward once under a line and instruction tracer, after one untraced round that does the
late imports. `build()` and `model(*inputs)` are traced; what the recipe makes before, a configuration and example
inputs, is not. Both built-in recipes are the released configuration, without weights, on the meta device.

files           files of the model's own package (and of each --package) in which a line of a function ran
lines in them   all of their lines
lines that run  distinct lines that ran in their functions; module and class bodies do not count
`if`s           `if`, `elif` and conditional expressions in the functions that ran (not a comprehension's filter)
never taken     those whose condition never held: no instruction of the body ran, even if its line did

Needs Python 3.11 or newer, which keeps the column of every instruction.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from minisvd.config import UNetConfig
from minisvd.unet import SpatioTemporalUNet
from tools.output import table

Recipe = tuple[Callable[[], nn.Module], tuple[Any, ...]]
"""(build, inputs): the model is build(), its forward is model(*inputs)."""

TITLES = ("codebase", "files", "lines in them", "lines that run", "`if`s", "`if`s never taken")


@dataclass(frozen=True)
class If:
    """One `if` of a function that ran. `taken`: its condition once held; `otherwise`: its else once ran, if any."""

    file: str
    line: int
    taken: bool
    otherwise: bool


@dataclass(frozen=True)
class ReadingCost:
    files: tuple[str, ...]
    lines: int
    lines_run: int
    ifs: tuple[If, ...]

    @property
    def never_taken(self) -> tuple[If, ...]:
        return tuple(i for i in self.ifs if not i.taken)

    def row(self, name: str) -> tuple[str, ...]:
        """The cells of a table, under TITLES."""
        counts = (len(self.files), self.lines, self.lines_run, len(self.ifs), len(self.never_taken))
        return name, *(f"{n:,}" for n in counts)


def reading_cost(recipe: Recipe, packages: tuple[str, ...] = ()) -> ReadingCost:
    """Measure build() and model(*inputs) in the files of the model's package and of `packages`."""
    build, inputs = recipe
    with torch.no_grad():
        model = build()
        model(*inputs)
        names = (type(model).__module__.partition(".")[0], *packages)
        roots = tuple(root for name in names for root in code_roots(name))
        lines, offsets = trace(lambda: build()(*inputs), roots)

    files = sorted({code.co_filename for code in lines})
    texts = {file: Path(file).read_text(encoding="utf-8") for file in files}
    return ReadingCost(
        files=tuple(files),
        lines=sum(len(text.splitlines()) for text in texts.values()),
        lines_run=len({(code.co_filename, line) for code, ran in lines.items() for line in ran}),
        ifs=tuple(i for file, text in texts.items() for i in ifs_of(file, text, offsets)),
    )


def code_roots(module: str) -> list[str]:
    """A package's folders, a plain module's file."""
    found = sys.modules[module] if module in sys.modules else importlib.import_module(module)
    folders = [str(Path(folder).resolve()) + "/" for folder in getattr(found, "__path__", [])]
    return folders or [inspect.getfile(found)]


def trace(
    run: Callable[[], object], roots: tuple[str, ...]
) -> tuple[dict[CodeType, set[int]], dict[CodeType, set[int]]]:
    """The lines and the instructions (by offset) that run() runs, of every function whose file begins with a root."""
    lines: dict[CodeType, set[int]] = defaultdict(set)
    offsets: dict[CodeType, set[int]] = defaultdict(set)

    def inside(frame: FrameType, event: str, _arg: object) -> Any:
        if event == "line":
            lines[frame.f_code].add(frame.f_lineno)
        elif event == "opcode":
            offsets[frame.f_code].add(frame.f_lasti)
        return inside

    def on_call(frame: FrameType, _event: str, _arg: object) -> Any:
        code = frame.f_code
        if not code.co_flags & inspect.CO_OPTIMIZED or not code.co_filename.startswith(roots):
            return None  # a module's or a class's body, or somebody else's function
        frame.f_trace_opcodes = True
        return inside

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        run()
    finally:
        sys.settrace(before)
    return lines, offsets


def ifs_of(file: str, text: str, offsets: dict[CodeType, set[int]]) -> Iterator[If]:
    """Every `if` of the functions of a file that ran, with what ran of it."""
    codes = [code for code in offsets if code.co_filename == file]
    places = {place for code in codes for place in places_run(code, offsets[code])}

    def ran(part: list[Any]) -> bool:
        first, last = part[0], part[-1]
        start, end = (first.lineno, first.col_offset), (last.end_lineno, last.end_col_offset)
        return any(start <= begins and ends <= end for begins, ends in places)  # `a if b else c` begins where `a` does

    for node in ifs_inside(ast.parse(text), False, {(code.co_name, code.co_firstlineno) for code in codes}):
        body, orelse = ([p] if isinstance(p, ast.expr) else p for p in (node.body, node.orelse))
        yield If(file, node.lineno, taken=ran(body), otherwise=not orelse or ran(orelse))


def places_run(code: CodeType, ran: set[int]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where each instruction that ran begins and ends, as (line, column); columns count bytes, as in `ast`."""
    if sys.version_info < (3, 11):
        raise RuntimeError(f"this is Python {sys.version.split()[0]}; reading_cost needs 3.11 or newer")
    positions = list(code.co_positions())  # one per instruction word of two bytes
    for line, end_line, column, end_column in (positions[offset // 2] for offset in ran):
        if line is not None and end_line is not None and column is not None and end_column is not None:
            yield (line, column), (end_line, end_column)


def ifs_inside(node: ast.AST, runs: bool, functions: set[tuple[str, int]]) -> Iterator[ast.If | ast.IfExp]:
    """The `if`s under a node whose innermost function is one of `functions`, (name, first line)."""
    for child in ast.iter_child_nodes(node):
        inner = runs
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            first_line = min(part.lineno for part in (child, *child.decorator_list))
            inner = (child.name, first_line) in functions
        if runs and isinstance(child, ast.If | ast.IfExp):
            yield child
        yield from ifs_inside(child, inner, functions)


def example_inputs() -> tuple[torch.Tensor, ...]:
    """Two frames of 64x64 pixels: sample, c_noise, image embedding, the three numbers; shapes only."""
    shapes = (1, 2, 8, 8, 8), (1,), (1, 1, 1024), (1, 3)
    return tuple(torch.empty(shape, device="meta") for shape in shapes)


def minisvd_unet() -> Recipe:
    config = UNetConfig()

    def build() -> nn.Module:
        with torch.device("meta"):
            return SpatioTemporalUNet(config).eval()

    return build, example_inputs()


def diffusers_unet() -> Recipe:
    from diffusers import UNetSpatioTemporalConditionModel

    def build() -> nn.Module:
        with torch.device("meta"):
            unet = UNetSpatioTemporalConditionModel().eval()
        return nn.Module.to(unet, "meta")  # mix_factor disregards the context; diffusers' own `to` is not to be counted

    return build, example_inputs()


BUILT_IN = {"minisvd": minisvd_unet, "diffusers": diffusers_unet}


def find_recipe(spec: str) -> Recipe:
    """`minisvd`, `diffusers`, `module:function` or `file.py:function`."""
    if spec in BUILT_IN:
        return BUILT_IN[spec]()
    where, colon, function = spec.rpartition(":")
    if not colon:
        raise ValueError(f"recipe is {spec!r}; need minisvd, diffusers, module:function or file.py:function")
    if where.endswith(".py"):
        sys.path.insert(0, str(Path(where).resolve().parent))
        where = Path(where).stem
    return getattr(importlib.import_module(where), function)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="*", default=list(BUILT_IN), metavar="RECIPE", help="default: minisvd diffusers"
    )
    parser.add_argument("--package", action="append", default=[], help="another package that counts as the model's own")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every file and every `if`")
    args = parser.parse_args()
    costs = {spec: reading_cost(find_recipe(spec), tuple(args.package)) for spec in args.recipes}
    if args.json:
        print(json.dumps({spec: asdict(cost) for spec, cost in costs.items()}))
        return
    rows = [cost.row(f"{spec} (SVD)" if spec in BUILT_IN else spec) for spec, cost in costs.items()]
    print(table(TITLES, "lrrrrr", rows))


if __name__ == "__main__":
    main()
