"""Settings in YAML, from anyone: a mapping of scalars and of a few lists, and nothing that costs more to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slora.errors import CheckpointError, ConfigError
from slora.io.bounded import read_text

# A rank for each of a thousand layers is half of it.
LARGEST = 256 << 10

# A mapping of lists or of mappings is two levels deep; what is not settings is told so by its field.
DEEPEST = 8

LONGEST = 40


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, unreadable or too large, or holds something else.
    """
    try:
        text = read_text(path, LARGEST)
    except CheckpointError as error:
        if not Path(path).exists():
            raise ConfigError(f"{path} does not exist; give the path of a YAML file with settings") from error
        raise ConfigError(str(error)) from error
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected lines such as `lr: 0.001`")
    return values


def parse_yaml(text: str) -> Any:
    """Return the value of YAML text without aliases.

    Raises:
        ValueError: it is not YAML, is nested more than 8 levels deep, refers to a part of itself, or holds a number
            of more than 40 digits.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            # Each level of a few aliases multiplies what the one below stands for.
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it refers to a part of itself by *; write that out")
            self.depth += 1
            if self.depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} levels deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_scalar(self, node: Any) -> Any:
            if not isinstance(node, yaml.ScalarNode):
                return super().construct_scalar(node)
            # Digits and colons are a number to the base 60, which takes the square of their length.
            if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST:
                raise ValueError(f"it holds a number of {len(node.value)} digits")
            # The half of a character can be neither printed nor written again; UnicodeEncodeError is a ValueError.
            node.value.encode("utf-8")
            return super().construct_scalar(node)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # Scalars that are not what their tag says, such as `!!bool no number`, get Python's own errors.
        raise ValueError(str(error) or type(error).__name__) from error
