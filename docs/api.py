"""Writes into `api.md` what the docstrings say, between its marks; what stands outside them is written by hand.

    python docs/api.py           # after a docstring was changed
    python docs/api.py --check   # says whether it must be called

A mark `<!-- docstring: module.Name -->` takes a whole docstring, with its arguments as a table;
`<!-- table: module.Class name name ... -->` a line for each of these, of a class or a module; `<!-- end -->` ends both.
"""

import inspect
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import docstring_parser

PAGE = Path(__file__).with_name("api.md")
MARKED = re.compile(r"(<!-- (docstring|table): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def paragraphs(text: str) -> str:
    """A docstring's text as Markdown: what is indented is code."""
    blocks = []
    for block in (text or "").split("\n\n"):
        lines = block.split("\n")
        code = all(line.startswith("    ") for line in lines)
        blocks.append("\n".join(["```python", *(line[4:] for line in lines), "```"]) if code else block)
    return "\n\n".join(blocks)


def cell(text: str | None) -> str:
    """One line, for a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


def signature(name: str, thing: Any, method: bool) -> str:
    parameters = [*inspect.signature(thing).parameters.values()][int(method) :]
    plain = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
    return f"{name}{plain}"


def whole(thing: Any) -> str:
    text = inspect.cleandoc(thing.__doc__)
    head = re.split(r"^(?:Args|Returns|Raises|Attributes):$", text, maxsplit=1, flags=re.MULTILINE)[0].strip()
    parsed = docstring_parser.parse(text, docstring_parser.DocstringStyle.GOOGLE)
    defaults = inspect.signature(thing).parameters
    parts = [paragraphs(head)]
    if parsed.params:
        rows = []
        for param in parsed.params:
            names = param.arg_name.split(", ")
            known = [defaults[name].default for name in names if name in defaults]
            default = next((f"`{value!r}`" for value in known if value is not inspect.Parameter.empty), "")
            rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {default} | {cell(param.description)} |")
        parts.append("\n".join(["| argument | default | |", "| --- | --- | --- |", *rows]))
    if parsed.raises:
        parts.append("Raises " + " ".join(f"`{r.type_name}` {cell(r.description)}" for r in parsed.raises))
    return "\n\n".join(parts)


def line(owner: Any, name: str) -> str:
    thing = getattr(owner, name)
    if isinstance(thing, property):
        return f"| `{name}` | {cell(inspect.cleandoc(thing.__doc__).split(chr(10) * 2)[0])} |"
    method = inspect.isclass(owner) and inspect.isfunction(thing)
    return f"| `{signature(name, thing, method)}` | {cell(inspect.cleandoc(thing.__doc__).split(chr(10) * 2)[0])} |"


def made(match: re.Match) -> str:
    opening, kind, what, end = match.groups()
    path, *names = what.split()
    thing = pkgutil.resolve_name(path)
    if kind == "docstring":
        return f"{opening}\n{whole(thing)}\n\n{end}"
    rows = ["| call | what it does |", "| --- | --- |", *(line(thing, name) for name in names)]
    return f"{opening}\n" + "\n".join(rows) + f"\n\n{end}"


def page() -> str:
    """`api.md` as the docstrings have it now."""
    return MARKED.sub(made, PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if "--check" in sys.argv:
        raise SystemExit(page() != PAGE.read_text(encoding="utf-8") and "docs/api.md is old: python docs/api.py")
    PAGE.write_text(page(), encoding="utf-8")
