"""What all commands share: output, errors, and options that mean the same everywhere."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sagellm_ir.cli.help import Command, as_called, flag
from sagellm_ir.diagnostics import Diagnostic, SageIRError, suggest
from sagellm_ir.files import read_text, write_atomic

__all__ = [
    "AsJson",
    "KVSchema",
    "Level",
    "Limit",
    "MaxNew",
    "Out",
    "Overrides",
    "PipelineText",
    "Requests",
    "SkipBad",
    "TargetName",
    "TokenizerName",
    "command",
    "emit",
    "emit_json",
    "note",
    "one_of",
    "print_table",
    "read_input",
    "stderr",
    "working",
]

Args = ParamSpec("Args")
Result = TypeVar("Result")

EXTRAS = {
    "fastapi": "server",
    "httpx": "server",
    "prometheus_client": "server",
    "torch": "embedded",
    "uvicorn": "server",
}
"""Modules that some commands import, and the extras that install them."""

Requests = Annotated[
    list[str] | None,
    typer.Option(
        "--request",
        "-r",
        metavar="FILE",
        help="Requests: OpenAI bodies (JSON, JSONL, Batch), text, token ids or a trace; `-` is "
        "standard input. May be given several times.",
    ),
]
Level = Annotated[int, typer.Option("-O", metavar="0..3", min=0, max=3, help="Pipeline preset.")]
PipelineText = Annotated[
    str | None,
    typer.Option("--pipeline", "-p", metavar="TEXT", help="Passes to run, instead of a preset."),
]
TargetName = Annotated[
    str,
    typer.Option("--target", "-t", metavar="NAME|FILE", help="What to compile for."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the target."),
]
TokenizerName = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        metavar="auto|bytes|MODEL",
        help="How text becomes tokens. `auto`: the target's model if it is here, else bytes.",
    ),
]
SkipBad = Annotated[bool, flag("--skip-bad", help="Count bad lines and go on.")]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="Take the first N requests.")
]
MaxNew = Annotated[
    int,
    typer.Option(
        "--max-new", metavar="N", min=1, help="Tokens to generate where a request does not say."
    ),
]
KVSchema = Annotated[
    str,
    typer.Option(
        "--kv-schema",
        metavar="preset=auto|bf16|fp8|int8",
        help="How KV is stored; `auto`: in the model's type.",
    ),
]
AsJson = Annotated[bool, flag("--json", help="Print JSON for programs.")]
Out = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write here instead of standard output."),
]


def stderr() -> Console:
    """The console for all that is not the result."""
    return Console(stderr=True, highlight=False)


def working(what: str) -> AbstractContextManager[object]:
    """Says on stderr, on a terminal, what is being done while it lasts."""
    return stderr().status(escape(what))


def note(message: str) -> None:
    """A remark to the user, on stderr."""
    stderr().print(message, style="dim", markup=False, soft_wrap=True)


def command(
    app: typer.Typer, name: str, *, example: str
) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """Adds a command whose user errors, a missing extra among them, exit with 1.

    Args:
        example: the words behind the command's name, shown at the end of its help.
    """

    def decorate(function: Callable[Args, Result]) -> Callable[Args, Result]:
        app.command(name, cls=_Guarded, epilog=example)(function)
        return function

    return decorate


class _Guarded(Command):
    """Ends with a message and an exit code where the function raises what a user can cause."""

    def invoke(self, ctx: Any) -> Any:
        with _guard(ctx.command_path):
            return super().invoke(ctx)


@contextmanager
def _guard(called: str) -> Iterator[None]:
    try:
        yield
    except (SageIRError, ModuleNotFoundError) as error:
        message = as_called(str(_told(error)), called)
        stderr().print(message, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except BrokenPipeError:
        # The reader (`head`, say) has gone; nothing more to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        note(f"cannot write the result: {error.strerror}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        note("interrupted")
        raise typer.Exit(130) from None


def _told(error: SageIRError | ModuleNotFoundError) -> SageIRError:
    """An error of the user; a module of an extra that is not installed is one, any other is ours."""
    if isinstance(error, SageIRError):
        return error
    extra = EXTRAS.get(error.name or "")
    if extra is None:
        raise error
    return SageIRError(
        Diagnostic(f"this needs {error.name}", help=f"pip install 'sagellm-ir[{extra}]'")
    )


def emit(text: str, output: Path | None = None) -> None:
    """The result of a command: to a file, whole or not at all, or to stdout."""
    if output is not None:
        write_atomic(output, text if text.endswith("\n") else text + "\n")
        note(f"wrote {output}")
        return
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def emit_json(value: Any, output: Path | None = None) -> None:
    """The result of a command, as JSON."""
    emit(json.dumps(value, indent=2, ensure_ascii=False), output)


def one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    """Checks an option that takes one of a few words.

    Raises:
        typer.BadParameter: it is none of them.
    """
    if value not in known:
        raise typer.BadParameter(f"{option}: no {value!r}; {suggest(value, known)}")


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A table on stdout; plain enough to be piped."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console(highlight=False).print(table)


def read_input(path: str) -> str:
    """A whole text file, `-` for stdin.

    Raises:
        SageIRError: what `read_text` raises, or stdin is no UTF-8 text.
    """
    if path != "-":
        return read_text(Path(path))
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise SageIRError(Diagnostic("cannot read -: it is not UTF-8 text")) from None
