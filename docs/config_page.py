"""Every config key as text, from the declarations and docstrings of `rlp/config.py`."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "rlp" / "config.py"


@dataclass(frozen=True, slots=True)
class Key:
    """One value that a config may hold."""

    name: str
    type: str
    default: str
    """As YAML writes it; empty where a value has to be given."""
    meaning: str


def sections() -> dict[str, tuple[str, list[Key]]]:
    """Of each section of a config its docstring and its keys, in the order of the file."""
    classes = {
        node.name: node
        for node in ast.parse(CONFIG.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    found = {}
    for field in classes["Config"].body:
        if isinstance(field, ast.AnnAssign):
            section = classes[field.annotation.id]
            found[field.target.id] = (ast.get_docstring(section), _keys(section))
    return found


def _keys(section: ast.ClassDef) -> list[Key]:
    """A field and the string that follows it."""
    keys = []
    for node, after in zip(section.body, section.body[1:], strict=False):
        if not isinstance(node, ast.AnnAssign):
            continue
        told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        meaning = " ".join(after.value.value.split()) if told else ""
        keys.append(
            Key(node.target.id, ast.unparse(node.annotation), _default(node.value), meaning)
        )
    return keys


def _default(value: ast.expr) -> str:
    if isinstance(value, ast.Call):  # field(default_factory=list)
        return "[]"
    given = ast.literal_eval(value)
    if given == "???":  # OmegaConf's sign of a value that has to be given
        return ""
    if isinstance(given, str):
        return f'"{given}"' if not given or given[0] in "{<" else given
    if given is None or isinstance(given, bool):
        return "null" if given is None else str(given).lower()
    return str(given)


def config_keys() -> str:
    """The sections as Markdown, each key with its type, default and meaning."""
    lines = []
    for name, (docstring, keys) in sections().items():
        lines += [f"### `{name}`", "", _linked(docstring), ""]
        for key in keys:
            default = f"default `{key.default}`" if key.default else "has to be given"
            lines += [
                f"`{name}.{key.name}` ({key.type}, {default})",
                f": {_linked(key.meaning)}",
                "",
            ]
    return "\n".join(lines)


def _linked(text: str) -> str:
    """The pages of the site that a docstring names, as links."""
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text)
