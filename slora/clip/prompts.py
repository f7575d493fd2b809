"""Prompts: the names of the classes and the templates that make a text tower name an image.

Templates are those of open_clip where there are no others. Names for ImageNet are in `slora.sources.imagenet`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from slora.errors import ConfigError

# Names of open_clip's two sets of templates; a registered CLIP may have others of its own.
NAMED = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}

_SYNSET = re.compile(r"n\d{8}")


class Prompts(NamedTuple):
    """The prompts of a data set: `template.format(name)` of each template for each class."""

    names: tuple[str, ...]
    """A name for each class, in the order of the labels."""
    templates: tuple[str, ...]
    """Texts with one `{}`."""

    def texts(self) -> list[str]:
        """Return all prompts: those of the first class, then those of the second, ..."""
        return [template.format(name) for name in self.names for template in self.templates]


def templates(named: str | None, own: Sequence[str] = ()) -> tuple[str, ...]:
    """Return templates as text with `{}` for the name.

    Args:
        named: "openai" (the 80 of the CLIP paper), "simple" (the 7 that its authors found to do as well), or a file
            with one on each line; None for `own`, or without those for "openai".
        own: templates that come with the model.

    Raises:
        ConfigError: it is neither, the file is empty, or a line has no `{}` or more than one; names the line.
    """
    if named is None and own:
        return tuple(own)
    named = named or "openai"
    if named in NAMED:
        import open_clip

        return tuple(template("{}") for template in getattr(open_clip, NAMED[named]))
    path = Path(named).expanduser()
    if not path.is_file():
        raise ConfigError(f"templates={named!r} is neither {' nor '.join(NAMED)} nor a file with a template on a line")
    lines = [(number, line.strip()) for number, line in enumerate(_lines(path, "templates"), start=1) if line.strip()]
    for number, line in lines:
        _require_template(line, f"line {number} of {path}")
    if not lines:
        raise ConfigError(f"{path} holds no template; write one on each line, such as: a photo of a {{}}.")
    return tuple(line for _, line in lines)


def require_prompts(prompts: Prompts) -> None:
    """Refuse prompts that a text tower cannot tell classes by.

    Raises:
        ConfigError: there is no name or no template, or a template has no `{}` or more than one.
    """
    if not prompts.names:
        raise ConfigError("there is no name of a class; give one for each, in the order of the labels")
    if not prompts.templates:
        raise ConfigError('there is no template; give at least one, such as "a photo of a {}."')
    for template in prompts.templates:
        _require_template(template, "a template")


def _require_template(text: str, where: str) -> None:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError:
        fields = []
    if fields != [""]:
        raise ConfigError(f"{where} is {text[:60]!r}; a template has one {{}} where the name of the class stands")


def refuse_ids(names: Sequence[str], data: str) -> None:
    """Refuse names that say nothing to a text tower.

    Raises:
        ConfigError: they are WordNet ids.
    """
    if names and all(_SYNSET.fullmatch(name) for name in names):
        raise ConfigError(
            f"the {len(names)} classes of {data} are WordNet ids such as {names[0]!r}, which are no words; give their "
            f"names with class_names (on the command line --class-names FILE)"
        )


def names_of_file(path: Path, classes: Sequence[str], data: str) -> tuple[str, ...]:
    """Return a name for each class of a data set from a text file.

    Args:
        path: a name on each line, in the order of the classes; or on every line a class, a tab and its name.
        classes: the classes of the data set, such as the names of its folders, in the order of the labels.
        data: the name of the data set, for messages.

    Raises:
        ConfigError: the file does not fit the classes; names what differs.
    """
    lines = [line.rstrip("\r") for line in _lines(path, "class_names") if line.strip()]
    if not any("\t" in line for line in lines):
        if len(lines) != len(classes):
            raise ConfigError(
                f"{path} has {len(lines)} names, but {data} has {len(classes)} classes, from {classes[0]!r} to "
                f"{classes[-1]!r}; write one name on each line, in that order, or CLASS<TAB>NAME"
            )
        return tuple(line.strip() for line in lines)
    names: dict[str, str] = {}
    for line in lines:
        folder, name = (part.strip() for part in line.partition("\t")[::2])
        if not folder or not name:
            raise ConfigError(f"{path} has the line {line[:60]!r}, not CLASS<TAB>NAME as on others; complete it")
        if folder in names:
            raise ConfigError(f"{path} names the class {folder!r} twice; remove one of the lines")
        names[folder] = name
    unnamed, unknown = [name for name in classes if name not in names], [name for name in names if name not in classes]
    if unnamed or unknown:
        what = f"no name for the class {unnamed[0]!r}" if unnamed else f"a name for {unknown[0]!r}, which is no class"
        others = max(len(unnamed), len(unknown)) - 1
        raise ConfigError(
            f"{path} has {what} of {data}{f' (and {others} more)' if others else ''}; name each of its "
            f"{len(classes)} classes once"
        )
    return tuple(names[name] for name in classes)


def _lines(path: Path, setting: str) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"{setting}={str(path)!r} is not a file; give a text file with one entry on each line")
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}); give a text file") from error
