"""`main`: builds and runs the command line. No torch is imported before the arguments are checked: it takes seconds."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated, Any

import slora.demo  # noqa: F401 (registers its model and data sets by name)
from slora import __version__
from slora.cli.errors import all_processes_fail, as_text, print_error, show_tracebacks, warnings_as_lines
from slora.errors import ConfigError, SLoRAError

try:
    import typer
except ImportError:
    typer = None  # type: ignore[assignment]

NEEDS_TRAIN = (
    'this command needs the training extra; install it with: pip install "slora[train]". '
    "Without it only slora doctor works"
)

# Seconds until a process that is not the first exits after an error that the first one meets as well. The launcher ends
# it earlier, once the first process has printed the error; an earlier exit would end the first before it has.
PATIENCE = 30.0


def main() -> None:
    """Run the command line; slora's own errors are printed as one red line on stderr, with exit code 2."""
    if typer is None:
        _without_typer(sys.argv[1:])
    try:
        with warnings_as_lines():
            app()(prog_name="slora")
    except (SLoRAError, OSError, ImportError) as error:
        if show_tracebacks():
            raise
        if all_processes_fail(error):
            time.sleep(PATIENCE)
        print_error(as_text(error))
        sys.exit(2)
    except RuntimeError as error:
        # torch.cuda.OutOfMemoryError, by name: torch may not be imported.
        if type(error).__name__ != "OutOfMemoryError" or show_tracebacks():
            raise
        print_error("the GPU is out of memory; lower --batch-size and raise --gradient-accumulation by the same factor")
        sys.exit(2)


def app() -> typer.Typer:
    """Build the command line."""
    from slora.cli.compress import compress
    from slora.cli.decompress import decompress
    from slora.cli.demo import demo
    from slora.cli.doctor import doctor
    from slora.cli.evaluate import evaluate
    from slora.cli.finetune import finetune
    from slora.cli.inspect import inspect
    from slora.cli.merge import merge
    from slora.cli.report import report
    from slora.cli.reproduce import reproduce
    from slora.runs.flags import completed, with_settings

    result = typer.Typer(
        name="slora",
        help="Selective low-rank adaptation: fine-tune a pretrained model with few active LoRA blocks.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    class OptionalValues(typer.core.TyperCommand):
        """A command with flags that may stand without their value."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, completed(args))

    result.callback()(_before_command)
    tools = (merge, compress, decompress, inspect, report)
    for command in (demo, with_settings(finetune), evaluate, *tools, reproduce, doctor):
        result.command(command.__name__, cls=OptionalValues)(command)
    return result


def _without_typer(arguments: list[str]) -> None:
    """Do what is possible without the training extra, and exit."""
    if arguments == ["--version"]:
        print(f"slora {__version__}")
        sys.exit(0)
    if arguments == ["doctor"]:
        from slora.cli.doctor import doctor

        doctor()
        sys.exit(0)
    print(NEEDS_TRAIN, file=sys.stderr)
    sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"slora {__version__}")
        raise typer.Exit


def _before_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error. Also: SLORA_TRACEBACK=1.")
    ] = False,
) -> None:
    if traceback:
        os.environ["SLORA_TRACEBACK"] = "1"
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and context.invoked_subcommand != "finetune":
        raise ConfigError(
            f"WORLD_SIZE={processes}: slora {context.invoked_subcommand} runs in one process, only slora finetune in "
            f"several; start it without torchrun or accelerate launch"
        )
