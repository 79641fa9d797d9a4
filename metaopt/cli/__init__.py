"""The command line: one command per file of this folder, each with a `register(app)` that adds it."""

import contextlib
import os
import pkgutil
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from metaopt.errors import MetaoptError, SpecError

# every mistake in the arguments is one of these; typer carries click inside and exports only this leaf
_ArgumentError: Any = typer.BadParameter.__mro__[2]

INTERRUPTED = 130
TERMINATED = 143  # what a shell reports for a program that SIGTERM ended
PIPE_CLOSED = 141  # what a shell reports for a program that SIGPIPE ended


# of a line of progress where no terminal shows a bar
SECONDS_BETWEEN_LINES = 10.0
# columns that a broken cell of a table needs to be readable below itself
NARROWEST = 20

Progress = Callable[[int, int], None]


class Keep(StrEnum):
    """Whose constants are in force when a checkpoint is loaded: the checkpoint's, or those of the live stack."""

    saved = "saved"
    live = "live"


class Interrupted(Exception):
    """The user's Ctrl-C, or a SIGTERM, in a command that can say what is kept and how to go on."""

    def __init__(self, text: str = "", status: int = INTERRUPTED) -> None:
        super().__init__(text)
        self.status = status


def write_out(text: str, out: Path | None, error: type[MetaoptError] = SpecError, *, with_folder: bool = False) -> None:
    """Print a text, or write it to a file and say so; `with_folder` makes the folder too.

    Raises `error` if the file cannot be written.
    """
    if out is None:
        print(text, end="")
        return
    try:
        if with_folder:
            out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as failure:
        raise error(f"{out} cannot be written: {failure.strerror or failure}") from None
    print(f"wrote {out}")


def load_plugins(names: list[str]) -> list[str]:
    """Import modules by name, also from the current folder, and register the parts that they offer."""
    if names:
        from metaopt.registry import registry

        folder = os.getcwd()
        if folder not in sys.path:
            sys.path.insert(0, folder)
        for name in names:
            registry.load_plugin_module(name)
    return names


# the option of every command that looks names up: `plugin: Plugins = []`
Plugins = Annotated[
    list[str],
    typer.Option(
        "--plugin", metavar="MODULE", callback=load_plugins, is_eager=True, help="Import this module as a plugin first."
    ),
]


@contextlib.contextmanager
def progress_of(what: str) -> Iterator[Progress]:
    """Give a function that is told how many of how many are done: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines_of_progress(what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines_of_progress(what: str) -> Progress:
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= SECONDS_BETWEEN_LINES:
            told = now
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return tell


def fitted(text: str, hanging: int = 0) -> str:
    """Return a text as it is for a pipe; for a terminal with its lines broken between words, below their last cell.

    Lines that begin at the edge go on `hanging` columns from it.
    """
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(piece for line in text.split("\n") for piece in _pieces(line, width, hanging))


def _pieces(line: str, width: int, hanging: int) -> list[str]:
    if len(line) <= width or "│" in line:
        return [line]
    cells = [found.end() for found in re.finditer(r"\S {2,}(?=\S)", line) if found.end() <= width - NARROWEST]
    indent = len(line) - len(line.lstrip())
    below = cells[-1] if cells else indent + 2 if indent else hanging
    return textwrap.wrap(line, width, subsequent_indent=" " * below, break_long_words=False, break_on_hyphens=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from metaopt import __version__

        print(f"metaopt {__version__}")
        raise typer.Exit


def make_app() -> typer.Typer:
    """Return the app with every command of this folder; nothing here imports torch."""
    # without rich's markup: help answers in half the time
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.callback()
    def metaopt(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        """Compose PyTorch optimizers: look parts up, explain stacks, train and compare."""

    for found in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name):
        import_module(f"{__name__}.{found.name}").register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 when done, 2 for a user's mistake, told in one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a replaced stream need not be reconfigurable
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        status = _run(sys.argv[1:] if arguments is None else [*arguments])  # `list` is a submodule here
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader left, as `head` does; python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = PIPE_CLOSED
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    try:
        command = typer.main.get_command(make_app())
        returned = command.main(arguments, prog_name="metaopt", standalone_mode=False)
        if returned == INTERRUPTED:
            return _fail("interrupted", INTERRUPTED)
        return returned if isinstance(returned, int) else 0
    except MetaoptError as error:
        return _fail(error)
    except Interrupted as error:
        return _fail(f"interrupted: {error}" if str(error) else "interrupted", error.status)
    except _ArgumentError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # it carries the help text, already printed by rich
            return 2
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "metaopt"
        told = error.format_message().replace("Value error, ", "").rstrip(".").replace("?.", "?")
        return _fail(f"{told}{'' if told.endswith('?') else '.'} See: {path} --help")
    except SystemExit as error:
        # typer's own way out of a closed pipe, with status 1
        if isinstance(error.__context__, BrokenPipeError):
            return PIPE_CLOSED
        raise
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)


def _fail(what: object, status: int = 2) -> int:
    """Tell what went wrong; of processes that torchrun has started, the first tells what is wrong for all of them."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        return status
    return fail(what, status)


def fail(what: object, status: int = 2) -> int:
    """Print one line on standard error and return the exit status."""
    line = " ".join(str(what).split())
    print(f"metaopt: {line}", file=sys.stderr)
    if sys.stderr.isatty():  # in a terminal also the text, with a caret under the fault
        for note in getattr(what, "__notes__", ()):
            print(note, file=sys.stderr)
    return status
