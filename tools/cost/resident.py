"""What this process takes in memory, as Linux counts it; light to import, so that one sees what others cost."""

from pathlib import Path


def resident(name: str) -> float:
    """Bytes of a row of /proc/self/status, such as VmHWM; not a number where there is none."""
    try:
        rows = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("nan")
    return float(next((row.split()[1] for row in rows if row.startswith(f"{name}:")), "nan")) * 1024


def own_memory() -> float:
    """Bytes in this process that are no file's."""
    return resident("RssAnon")
