"""YAML from anywhere: recipes, and the configuration of a run.

The safe loader, within bounds: a few aliases can stand for gigabytes of text, which whoever shows the value would
write out. A key that is given twice is an error, as YAML has it; the library would take the last.
"""

from typing import Any

import yaml
from yaml import YAMLError
from yaml.composer import ComposerError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from scf_fast.errors import InputError
from scf_fast.pipelines.aliases import StrPath
from scf_fast.pipelines.formats.file_kinds import Wanted
from scf_fast.pipelines.formats.text_file import read_text
from scf_fast.pipelines.text import shown

__all__ = ["YAMLError", "read_yaml"]

_MOST_BYTES = 1 << 20  # of a file
_DEEPEST = 20  # levels of lists and mappings
_MOST_VALUES = 10_000  # with every alias written out


class _BoundedLoader(yaml.SafeLoader):
    """The safe loader with the bounds of the module."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # values in a node, by its id: the nodes live as long as the document

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        mark, is_alias = self.peek_event().start_mark, self.check_event(AliasEvent)
        if self._depth >= _DEEPEST:
            raise ComposerError(None, None, f"is nested deeper than {_DEEPEST} levels", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._sizes:
            if is_alias:  # of what is not complete yet
                raise ComposerError(None, None, "a value contains itself", mark)
            size = self._size(node)
            if size > _MOST_VALUES:
                raise ComposerError(None, None, f"holds more than {_MOST_VALUES} values, aliases written out", mark)
            self._sizes[id(node)] = size
        return node

    def _size(self, node: Node) -> int:
        if isinstance(node, SequenceNode):
            inner = list(node.value)
        elif isinstance(node, MappingNode):
            inner = [part for pair in node.value for part in pair]
            _check_keys(node)
        else:
            return 1
        return 1 + sum(self._sizes[id(part)] for part in inner)


def _check_keys(node: MappingNode) -> None:
    keys = set()
    for key, _ in node.value:
        if isinstance(key, ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in keys:
                raise ComposerError(None, None, f"key {shown(key.value)} is there twice", key.start_mark)
            keys.add((key.tag, key.value))


def read_yaml(path: StrPath, wanted: Wanted = Wanted.TEXT) -> Any:
    """Returns what a YAML file holds.

    Raises:
        OSError: it cannot be read.
        InputError: it is no text, or too large.
        YAMLError, ValueError: it is no YAML, or beyond the bounds of the module.
    """
    text = read_text(path, wanted, _MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise InputError(f"{path}: has more than {_MOST_BYTES >> 20} MiB, which is no file of options")
    loader = _BoundedLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
