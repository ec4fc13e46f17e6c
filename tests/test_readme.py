"""README.md: its code runs, prints what it says, and names only what exists.

The code blocks run in order and share one namespace, as a reader would paste them one after the
other. They run with JAX's own defaults for promotion, which Flax and the reader's code rely on;
warnings are errors here too. What a block prints is, all of it, what the comments behind its
`print`s say: one comment behind each, with " | " between the lines of a `print` in a loop.
"""

import contextlib
import functools
import importlib
import io
import itertools
import re
import traceback
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import optaxclip

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


class Block(NamedTuple):
    """A code block of a Markdown file."""

    language: str
    heading: str
    line: int  # of the first line of code, counted from 1
    code: str

    @property
    def place(self):
        return f'README.md:{self.line}, under "{self.heading}"'


def blocks(text):
    """Every fenced block of a Markdown text."""
    found, heading, opened, code = [], "", None, []
    for number, line in enumerate(text.splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened, code = (line[3:].strip(), heading, number + 1), []
        elif opened is not None and line == "```":
            found.append(Block(*opened, "\n".join(code)))
            opened = None
        elif opened is not None:
            code.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    assert opened is None, f"README.md: the block that begins at line {opened[2]} does not end"
    return found


def promised(block):
    """The lines that the comments of a block say it prints."""
    lines = []
    for offset, line in enumerate(block.code.splitlines()):
        if line.lstrip().startswith("print("):
            _, hash_mark, comment = line.rpartition(")  # ")
            assert hash_mark, f"README.md:{block.line + offset}: say what this prints"
            lines += comment.split(" | ")
    return lines


def run(block, namespace):
    """What one block prints; an error in it says which block and keeps its own traceback."""
    # Blank lines in front, so that a traceback shows the line of README.md.
    source = "\n" * (block.line - 1) + block.code
    out = io.StringIO()
    try:
        program = compile(source, str(README), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(out):
            exec(program, namespace)
    except Exception as error:  # a snippet may raise anything; it goes on, with its place named
        message = f"{block.place}: {type(error).__name__}: {error}"
        raise AssertionError(message) from error
    return out.getvalue().splitlines()


@functools.cache
def readme():
    return README.read_text(encoding="utf-8")


def test_blocks_run_in_order_and_print_what_their_comments_say():
    """Every Python block of the README runs, and its output is the one shown."""
    snippets = [block for block in blocks(readme()) if block.language == "python"]
    assert len(snippets) == readme().count("```python") > 0
    namespace = {"__name__": "readme"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in snippets:
            assert run(block, namespace) == promised(block), block.place


def test_a_failing_block_is_named():
    """A block that fails says where it is."""
    text = "# One\n\n## Two\n\n```python\na = 1\nraise KeyError(a)\n```\n"
    (block,) = blocks(text)
    with pytest.raises(AssertionError, match=r'^README\.md:6, under "Two": KeyError: 1') as caught:
        run(block, {})
    *_, last = traceback.extract_tb(caught.value.__cause__.__traceback__)
    assert (last.filename, last.lineno) == (str(README), 7)


def test_a_print_that_shows_nothing_is_refused():
    """A print without a comment, and a block without an end, do not pass in silence."""
    (block,) = blocks("```python\nprint(1)\n```")
    with pytest.raises(AssertionError, match=r"README\.md:2: say what this prints"):
        promised(block)
    with pytest.raises(AssertionError, match="begins at line 2 does not end"):
        blocks("```python\nprint(1)  # 1\n")


def test_the_first_block_is_short():
    """Who reads only the first block has seen a whole training loop, in at most ten lines."""
    first = next(block for block in blocks(readme()) if block.language == "python")
    assert "apply_updates" in first.code
    assert sum(map(bool, first.code.splitlines())) <= 10


def test_the_evidence_is_what_the_program_says():
    """Every row of the evidence has the numbers of a row that examples/spiky_lm.py printed."""
    table = re.search(r"<!-- evidence -->(.*)<!-- /evidence -->", readme(), re.DOTALL)[1]
    program = (ROOT / "examples/spiky_lm.py").read_text(encoding="utf-8")
    lines = [re.split(r" {2,}", line.strip()) for line in program.splitlines()]
    # The program also prints the worst rise; what diverged has none.
    printed = {row[0]: row[1:] for row in lines if len(row) in {5, 7}}
    rows = [[x.strip() for x in row.split("|")[1:-1]] for row in table.strip().splitlines()[2:]]
    assert len(rows) > 10
    for name, bits, rise, *changed in rows:
        own = printed[re.search(r"\((\S+)\)$", name)[1]]
        shares = [share.removesuffix(" %") for share in changed]
        found = [bits, *shares] if "diverged" in bits else [bits, rise, *shares]
        assert found == ([*own[:2], *own[3:]] if len(own) > 4 else own), name


def test_names_in_backticks_exist():
    """What the text calls `optaxclip.x`, `measure.x`, `threshold.x` or `scale.x` is there."""
    pattern = r"`(?:optaxclip\.)?((?:measure|threshold|scale)\.\w+)|`optaxclip\.([\w.]+)"
    names = {first or second for first, second in re.findall(pattern, readme())}
    assert names
    for name in names:
        functools.reduce(getattr, name.split("."), optaxclip)


def test_metrics_table_lists_the_fields():
    """The table of metrics has the fields of `Metrics`, in their order, and no others."""
    rows = itertools.takewhile(
        lambda line: line.startswith("|"),
        itertools.dropwhile(lambda line: "of the last step" not in line, readme().splitlines()),
    )
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert names == list(optaxclip.Metrics._fields)


def test_policies_table_lists_the_policies():
    """The table of policies has those that the engine accepts, in their order, and no others."""
    names = re.findall(r'^\| `"(\w+)"`', readme(), re.MULTILINE)
    assert names == list(importlib.import_module("optaxclip._clip").NONFINITE)


def test_commands_are_targets_of_the_makefile():
    """Every `make` command in the README is one of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make (\w+)", readme(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_links_lead_somewhere():
    """Every relative link of the README is a file of the repository."""
    links = [link for link in re.findall(r"\]\(([^)#]+)", readme()) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
