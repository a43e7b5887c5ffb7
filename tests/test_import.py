"""Theorem: importing minisvd does no work: it loads no framework, prints nothing, and costs little over torch."""

import subprocess
import sys

import minisvd

HEAVY = ("diffusers", "transformers", "open_clip", "torchvision", "huggingface_hub")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_loads_nothing_heavy():
    """Bare import: not even torch. With every public name: torch, but none of the heavy libraries."""
    assert run("import minisvd, sys; print('torch' in sys.modules)") == "False"
    everything = "import minisvd, sys; [getattr(minisvd, name) for name in minisvd.HOME];"
    assert run(f"{everything} print([m for m in {HEAVY} if m in sys.modules])") == "[]"
    assert run(f"{everything} print('torch' in sys.modules)") == "True"  # control: the probe can see a module


def test_every_public_name_costs_under_half_a_second_beyond_torch():
    code = (
        "import torch, time; start = time.process_time(); import minisvd;"
        "[getattr(minisvd, name) for name in minisvd.HOME]; print(time.process_time() - start)"
    )
    seconds = min(float(run(code)) for _ in range(3))
    print(f"{seconds:.2f} s of processor time")
    assert seconds < 0.5


def test_help_and_version_do_not_import_torch():
    code = "import sys, contextlib\nfrom minisvd.cli import main\n"
    code += "with contextlib.suppress(SystemExit):\n    main(['--version'])\nprint('torch' in sys.modules)"
    assert run(code).splitlines()[-1] == "False"


def test_public_names_exist_and_others_do_not():
    assert set(minisvd.HOME) <= set(dir(minisvd))
    assert minisvd.Video.__name__ == "Video"
    assert not hasattr(minisvd, "no_such_name")
