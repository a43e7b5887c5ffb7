"""`python -m minisvd`, and the script `minisvd`: the command line as a process, whoever reads what it says."""

import os
import signal
import sys


def main() -> int:
    """`minisvd.cli.main`; also while that is being imported, Ctrl-C is one line. 141, as of `cat`, if stdout is closed.

    A name that stdout cannot spell is escaped; a stderr that is closed is none; SIGTERM leaves nothing half-written.
    """
    try:
        if sys.stderr is None:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        from .cli import main as run

        status = run()
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        print("minisvd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing is left to say at the end
        return 141


if __name__ == "__main__":
    sys.exit(main())
