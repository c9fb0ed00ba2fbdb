"""What every setting is for, read off the docstrings: ``python -m hdb_core.train.describe > docs/train-config.md``."""

from __future__ import annotations

import inspect
import json
import re
import sys

from .settings import Settings, flat

_HEAD = """# The settings of a training

`RUN/config.json` holds every setting; what is left out there has its default. `--set NAME=VALUE` changes one, with its
full name and a value as in JSON: `--set train.learning_rate=5e-4 'train.noise=[0.05,0.95]'`. This page is made from the
code: `python -m hdb_core.train.describe > docs/train-config.md`.
"""


def purposes(settings: object, prefix: str = "") -> dict[str, str]:
    """The full name of every setting → what it is for."""
    found: dict[str, str] = {}
    texts: dict[str, str] = {}
    for base in reversed(type(settings).__mro__):
        texts |= _attributes(base)
    for name in getattr(settings, "__dataclass_fields__", {}):
        value = getattr(settings, name)
        if name in texts:
            found[prefix + name] = texts[name]
        else:  # a section
            found |= purposes(value, f"{name}.")
    return found


def markdown() -> str:
    """``docs/train-config.md``."""
    defaults, texts = flat(Settings()), purposes(Settings())
    parts, section = [_HEAD], None
    for name, text in texts.items():
        own = name.rpartition(".")[0]
        if own != section:
            section = own
            title = getattr(Settings(), own) if own else Settings()
            heading = (inspect.getdoc(type(title)) or "").splitlines()[0]
            parts.append(f"\n## {own or 'run'}\n\n{heading}\n\n| setting | default | |\n|---|---|---|\n")
        parts.append(f"| `{name}` | `{json.dumps(defaults[name])}` | {text} |\n")
    return "".join(parts)


def _attributes(documented: type) -> dict[str, str]:
    """The attributes section of a class's docstring."""
    lines = inspect.cleandoc(documented.__doc__ or "").splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines[lines.index("Attributes:") + 1 :] if "Attributes:" in lines else []:
        if match := re.fullmatch(r"    (\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif line.startswith("        "):
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found


if __name__ == "__main__":
    sys.stdout.write(markdown())
