"""`TrainSettings` as command-line flags: one for each field, with its description and default."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from slora.runs.settings import TrainSettings

# For users `--blocks` is the budget; blocks per layer are rarely set.
FLAGS = {"budget": ("--blocks", "--budget"), "blocks": ("--blocks-per-layer",)}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with a flag for every field of `TrainSettings` in place of its `**settings`."""

    def called(**arguments: Any) -> None:
        command(**arguments)

    hints = typing.get_type_hints(command, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    setting_hints = typing.get_type_hints(TrainSettings, include_extras=True)
    for field in dataclasses.fields(TrainSettings):
        hint, sentence = get_args(setting_hints[field.name])
        annotation = _flag(field.name, hint, sentence, field.default)
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    called.__name__, called.__doc__ = command.__name__, command.__doc__
    return called


def completed(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments in which every flag has a value that may stand without one.

    Those are the settings of type `bool | str`: `--pretrained` and `--no-pretrained` mean true and false.
    """
    hints = typing.get_type_hints(TrainSettings)
    values: dict[str, str] = {}
    for name in (name for name, hint in hints.items() if set(get_args(hint)) == {bool, str}):
        flag = name.replace("_", "-")
        values |= {f"--{flag}": f"--{flag}=true", f"--no-{flag}": f"--{flag}=false"}
    result: list[str] = []
    for i, argument in enumerate(arguments):
        alone = argument.startswith("--no-") or i + 1 == len(arguments) or arguments[i + 1].startswith("-")
        result.append(values[argument] if argument in values and alone else argument)
    return result


def _flag(name: str, hint: Any, sentence: str, default: Any) -> Any:
    import typer

    flags = FLAGS.get(name, ("--" + name.replace("_", "-"),))
    help = f"{sentence} [default: {_shown(default)}]"
    # None means that the flag was not used: then a config file, or the default, decides.
    types = [hint] if get_origin(hint) is Literal else [t for t in get_args(hint) or (hint,) if t is not type(None)]
    if get_origin(types[0]) is Literal and len(types) == 1:
        return Annotated[str | None, typer.Option(*flags, help=help, metavar="|".join(get_args(types[0])))]
    if set(types) == {bool, str}:
        return Annotated[str | None, typer.Option(*flags, help=help, metavar="[VALUE]")]
    if types == [bool]:
        return Annotated[bool | None, typer.Option(f"{flags[0]}/--no-{flags[0][2:]}", help=help)]
    number = types[0] if types in ([int], [float]) else str
    return Annotated[number | None, typer.Option(*flags, help=help)]


def _shown(default: Any) -> str:
    if default is None:
        return "unset"
    return {True: "yes", False: "no"}[default] if isinstance(default, bool) else str(default)
