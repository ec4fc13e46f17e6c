"""The API reference, as HTML, out of the docstrings.

    python docs/build.py --out out/docs

One page for the package, and one for each of its rooms. A page has what its module names as its
own, by `from .x import y as y`, or else what is defined in it. The pages need no network.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pdoc

import optaxclip

FOOTER = f"optaxclip {optaxclip.__version__}"
# A table of reStructuredText, which is none in Markdown.
TABLE = re.compile(r"^(=+ +=[= ]*\n)(?:.+\n)+?\1(?:.+\n)+?\1", re.MULTILINE)
# A field of a NamedTuple, and what its comment says, in one line or more.
FIELD = re.compile(r"^    (\w+): .*?  # (.+(?:\n +#  .*)*)", re.MULTILINE)
# Types go by where they are defined, and a dot in a signature is a lot of HTML.
NAMES = {"jax.jaxlib._jax.Array": "jax.Array", "optax._src.base.": "optax."}
DOT = '</span><span class="o">.</span><span class="n">'


def exported(module: ModuleType) -> list[str]:
    """What a module imports under its own name, which is how it says that others may."""
    imports = [
        x for x in ast.parse(inspect.getsource(module)).body if isinstance(x, ast.ImportFrom)
    ]
    return [name.name for x in imports for name in x.names if name.asname == name.name]


def rooms() -> list[str]:
    """The modules that the package exports."""
    return [name for name in exported(optaxclip) if inspect.ismodule(getattr(optaxclip, name))]


def build(out: Path) -> None:
    """Writes the pages."""
    modules = [importlib.import_module(f"optaxclip.{room}") for room in rooms()]
    documented: dict[int, Any] = {}  # each once, though it may be on two pages
    for module in (optaxclip, *modules):
        if names := exported(module):
            module.__all__ = names
        for name in names:
            setattr(module, name, as_function(name, getattr(module, name)))
        documented |= {id(value): value for value in (module, *vars(module).values())}
    for value in documented.values():
        prepare(value)
    pdoc.render.configure(
        docformat="google", include_undocumented=False, show_source=False, footer_text=FOOTER
    )
    others = rf"!optaxclip\.(?!(?:{'|'.join(rooms())})$)"
    with tempfile.TemporaryDirectory() as folder:  # in `out` there may be more than these pages
        pages = Path(folder, "pages")
        # In a checkout, "optaxclip" would be a folder beside the package that is installed.
        with contextlib.chdir(folder):
            pdoc.pdoc("optaxclip", others, output_directory=pages)
        for page in pages.rglob("*.*"):
            rename_types(page)
        shutil.copytree(pages, out, dirs_exist_ok=True)


def rename_types(page: Path) -> None:
    """Writes types as their users do."""
    text = page.read_text(encoding="utf-8")
    for private, public in NAMES.items():
        for dot in (".", DOT):
            text = text.replace(private.replace(".", dot), public.replace(".", dot))
    page.write_text(text, encoding="utf-8")


def as_function(name: str, value: Any) -> Any:
    """An object that is called as a function, such as `scale.strict`, as one, to be shown so."""
    if not callable(value) or inspect.isroutine(value) or inspect.isclass(value):
        return value

    def shown(*args: Any, **kwargs: Any) -> Any:
        return value(*args, **kwargs)

    shown.__doc__, shown.__signature__ = inspect.getdoc(value), inspect.signature(value)
    shown.__module__, shown.__name__, shown.__qualname__ = type(value).__module__, name, name
    return shown


def prepare(value: Any) -> None:
    """Changes what pdoc would not understand."""
    name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")
    if not str(name).startswith("optaxclip"):
        return
    if TABLE.search(inspect.cleandoc(value.__doc__ or "")):
        value.__doc__ = TABLE.sub(r"```text\n\g<0>```\n", inspect.cleandoc(value.__doc__))
    if inspect.isclass(value) and hasattr(value, "_fields"):
        # In the text that these are, pdoc would look for names in vain.
        value.__annotations__ = value.__new__.__annotations__ = get_type_hints(value)
        for field, comment in FIELD.findall(inspect.getsource(value)):
            getattr(value, field).__doc__ = re.sub(r"\n *# *", " ", comment)


def main() -> None:
    """Builds, with every warning an error."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/docs"))
    out = parser.parse_args().out
    warnings.simplefilter("error")
    build(out)
    print(f"wrote {out / 'index.html'}")


if __name__ == "__main__":
    main()
