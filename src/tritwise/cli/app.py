"""The typer application, and the one place where errors become a line and an exit code."""

import json
import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated

import typer

from tritwise._version import __version__
from tritwise.cli import arb, bench, commands, compress, tokens
from tritwise.errors import UserError, is_out_of_memory
from tritwise.files import explain

# typer brings click under another name in some versions; its public BadParameter leads to the classes either way.
ClickError: type[Exception] = typer.BadParameter.__mro__[2]  # BadParameter < UsageError < ClickException

app = typer.Typer(
    name="tritwise",
    help="Train, measure and ship language models whose weights are only ever -1, 0 or +1.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    commands.train,
    arb.pretrain,
    arb.finetune,
    arb.caption,
    arb.transcribe,
    arb.generate,
    commands.score,
    commands.sample,
    commands.ship,
    compress.compress,
    compress.decompress,
    tokens.tokenize,
    commands.audit,
    commands.report,
    commands.doctor,
):
    app.command()(command)
app.add_typer(bench.app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 the user can put it right, 130 stopped by Ctrl-C."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=given, prog_name="tritwise", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UserError as error:
        return _fail(str(error), given)
    except ClickError as error:
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        return _fail(f"{message}; see {context.command_path if context else 'tritwise'} --help", given)
    except BrokenPipeError:
        # The reader has left (head, less): not an error, but Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(str(explain(error, error.filename or "a file", "write")), given)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("stopped\n")
        if "--json" in given:
            print(json.dumps({"interrupted": True}))
        return 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail("there is not enough memory for this; choose a smaller --batch, --ctx or --width", given)


def _fail(message: str, given: list[str]) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    if "--json" in given:
        print(json.dumps({"error": " ".join(message.split())}))
    return 2


def run() -> None:
    """Entry point of the console script."""
    # A sample holds any character, and a terminal or pipe may know only some: a mark in its place, not an error.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    sys.exit(main())
