"""Programs around minisvd, run from a checkout's root as `python -m tools.…`; README.md beside this file lists them."""
