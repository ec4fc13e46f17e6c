"""The API reference: every public name is on its page, every link leads somewhere."""

import html.parser
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_public import PUBLIC

import optaxclip

pytestmark = pytest.mark.whole  # cheap, and each cell says something of its own

ROOT = Path(__file__).resolve().parents[1]
# What may be in the folder before: a text with what is replaced in pages, and no text at all.
OTHERS = {"notes.txt": b"a jax.jaxlib._jax.Array", "picture.png": b"\x89PNG\r\n\x1a\n"}
NAMES = [name for name, value in PUBLIC.items() if not inspect.ismodule(value)]


class Page(html.parser.HTMLParser):
    """What a reader, and a link, finds on a page."""

    def __init__(self, path):
        super().__init__()
        self.path, self.anchors, self.links = path, {}, []
        self._inside, self._anchor, self.code = [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in {"script", "style", "pre"}:
            self._inside.append(tag)
        if "id" in attributes:
            self._anchor = attributes["id"]
            self.anchors[self._anchor] = ""
        if "href" in attributes:
            self.links.append(attributes["href"])

    def handle_endtag(self, tag):
        if self._inside[-1:] == [tag]:
            self._inside.pop()

    def handle_data(self, data):
        """Text belongs to the last anchor; that of programs and styles to none."""
        if self._inside[-1:] == ["pre"]:
            self.code += data
        elif not self._inside and self._anchor:
            self.anchors[self._anchor] += data


@pytest.fixture(name="out", scope="module")
def fixture_out(tmp_path_factory):
    """Where the pages are built as `make docs` does, with warnings as errors."""
    out = tmp_path_factory.mktemp("docs")
    for name, content in OTHERS.items():
        (out / name).write_bytes(content)
    command = [sys.executable, "-W", "error", ROOT / "docs/build.py", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return out


@pytest.fixture(name="pages", scope="module")
def fixture_pages(out):
    """The pages by their path."""
    return {path.relative_to(out).as_posix(): Page(path) for path in out.rglob("*.html")}


def test_every_room_has_a_page(pages):
    """There is a page for the package and for each module that it exports, and no other."""
    modules = re.findall(
        r"^from \. import (\w+) as \1$", inspect.getsource(optaxclip), re.MULTILINE
    )
    assert len(modules) > 10
    rooms = {f"optaxclip/{module}.html" for module in modules}
    assert set(pages) == {"index.html", "optaxclip.html"} | rooms


def test_other_files_stay_as_they_are(out):
    """What a user has in the folder is not touched, text or not."""
    assert {name: (out / name).read_bytes() for name in OTHERS} == OTHERS


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_on_its_page(name, pages):
    """A public name has a place on the page of its module, with the docstring's first words."""
    module, _, own = name.rpartition(".")
    anchors = pages[f"{module.replace('.', '/')}.html"].anchors
    assert own in anchors
    # A class has anchors within, for its fields.
    text = " ".join(text for key, text in anchors.items() if key.partition(".")[0] == own)
    words = re.findall(r"\w+", inspect.getdoc(PUBLIC[name]))[:4]
    assert " ".join(words) in " ".join(re.findall(r"\w+", text))


def test_every_link_leads_somewhere(pages):
    """A link within the pages leads to one, and to what is on it."""
    by_path = {page.path: page for page in pages.values()}
    links = [(page, link) for page in pages.values() for link in page.links if ":" not in link]
    assert len(links) > 500
    for page, link in links:
        file, _, anchor = link.partition("#")
        target = by_path[(page.path.parent / file).resolve() if file else page.path]
        assert not anchor or anchor in target.anchors, (page.path.name, link)


def test_nothing_is_left_of_the_markup(pages):
    """Roles, tables and private paths of types are not in what a reader reads."""
    for page in pages.values():
        text = " ".join(page.anchors.values())
        assert not re.findall(
            r":(?:class|func|meth|mod):|```|={4,}|_jax\b|_src\b|Annotated\[", text
        )
    front = pages["optaxclip.html"]
    assert "grads, params --measure--> norms --threshold--> limits" in front.code
    assert "bit for bit unchanged" in front.code
    assert "largest norm before clipping" in front.anchors["Metrics.norm"]
    assert f"optaxclip {optaxclip.__version__}" in front.path.read_text(encoding="utf-8")
