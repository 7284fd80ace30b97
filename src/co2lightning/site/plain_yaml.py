"""Read YAML that holds plain data and means what it says: recipes, `site.yaml`."""

from collections.abc import Hashable
from typing import Any

import yaml

from co2lightning.errors import UserError, show

_MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """SafeLoader that also refuses aliases, keys that are there twice and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem(event, "aliases (*name) are not read; write the value")
        if self.depth > _MAX_DEPTH:
            raise _problem(event, "is nested too deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                where = "" if lines[key] == line else f", first in line {lines[key]}"
                raise _problem(key_node, f"the key {show(key)} is there twice{where}; keep one")
            lines[key] = line
        return super().construct_mapping(node, deep)


def _problem(place: yaml.Event | yaml.Node, what: str) -> UserError:
    return UserError(f"line {place.start_mark.line + 1}: {what}")


def parse_yaml(data: bytes, name: str, like: str) -> object:
    """Return what a YAML file holds.

    Args:
        data: Its bytes.
        name: What messages call it.
        like: Where to see how it is written.

    Raises:
        UserError: No YAML, more than plain data, or a key that is there twice.
    """
    try:
        return _Loader(data.decode("utf-8-sig")).get_single_data()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text; save the file as UTF-8") from error
    except Exception as error:  # PyYAML fails in many ways on odd tags, dates and numbers
        line, problem = "", " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, yaml.MarkedYAMLError):
            mark, problem = error.problem_mark, error.problem or "syntax"
            line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(
            f"{name}: {line}is not plain YAML ({show(problem)}); write `key: value` lines as in "
            f"{like}"
        ) from error
