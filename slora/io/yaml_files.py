"""Reading settings from YAML files of any origin: mappings of scalars, lists and mappings, with limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slora.errors import CheckpointError, ConfigError
from slora.io.bounded import read_text

# Bytes; ranks for a thousand layers take half of it.
LARGEST = 256 << 10

# Levels of nesting; settings have two.
DEEPEST = 8

# Digits of a number.
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
        raise ConfigError(f"{path} cannot be read as YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected lines such as `lr: 0.001`")
    return values


def parse_yaml(text: str) -> Any:
    """Return the value of YAML text without aliases.

    Raises:
        ValueError: it is not YAML, is nested more than 8 levels deep, holds an alias, or a number of more than 40
            digits.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            # Nested aliases expand exponentially.
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it holds an alias (*); write the value out")
            self.depth += 1
            if self.depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} levels deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_scalar(self, node: Any) -> Any:
            if not isinstance(node, yaml.ScalarNode):
                return super().construct_scalar(node)
            # Numbers to the base 60, digits with colons, take quadratic time.
            if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST:
                raise ValueError(f"it holds a number of {len(node.value)} digits")
            # A lone surrogate can be neither printed nor written. UnicodeEncodeError is a ValueError.
            node.value.encode("utf-8")
            return super().construct_scalar(node)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # Scalars that contradict their tag, such as `!!bool no number`, raise Python's own errors.
        raise ValueError(str(error) or type(error).__name__) from error
