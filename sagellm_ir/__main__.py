"""The command `sagellm-ir`, also as `python -m sagellm_ir` for where its script is not on the path."""

import sys

__all__ = ["run"]


def run() -> int:
    """Runs the command line; the exit code."""
    try:
        from sagellm_ir.cli.main import main
    except KeyboardInterrupt:  # the imports take long enough to change one's mind
        print("interrupted", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    raise SystemExit(run())
