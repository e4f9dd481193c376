"""Read YAML files with limits on size and nesting; duplicate names are refused, and every error is one line."""

from pathlib import Path
from typing import Any

import yaml

from handlers.fields import FieldError, show

MAX_BYTES = 1_000_000


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML or JSON file, for `handlers.fields.read_strict`.

    Raises:
        FieldError: it cannot be parsed; the message names the file and the line.
        OSError: it cannot be opened.
    """
    path = Path(path)
    if path.is_dir():
        raise FieldError(f"{path}: is a folder, not a YAML file")
    if path.exists() and not path.is_file():
        raise FieldError(f"{path}: is not an ordinary file")
    with path.open("rb") as stream:
        raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise FieldError(f"{path}: more than {MAX_BYTES} bytes: not a file of settings")
    try:
        content = yaml.load(raw.decode("utf-8"), _Loader)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise FieldError(f"{path}: line {line}: not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        raise FieldError(f"{path}: {place}{error.problem or error.context}: not valid YAML") from None
    except yaml.reader.ReaderError as error:
        line = raw.decode("utf-8")[: error.position].count("\n") + 1
        raise FieldError(f"{path}: line {line}: a control character: not valid YAML") from None
    except RecursionError:
        raise FieldError(f"{path}: nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date or a number that does not exist
        raise FieldError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        raise FieldError(f"{path}: is empty")
    return content


# The loader in C is fast and limits the nesting, but not every build of PyYAML has it.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """Refuses duplicate names in a mapping, and merges, a few lines of which can fill the memory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.tag == "tag:yaml.org,2002:merge":
                raise _error("merging with << is not supported", key)
            if (key.tag, key.value) in seen:
                raise _error(f"the name {show(key.value)} stands twice", key)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _error(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
