"""The front door: what is public is documented, exported, listed in the README and light."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from roster import EVERY

import optaxclip
from optaxclip import variants

pytestmark = pytest.mark.whole  # cheap, and each cell says something of its own

ROOT = Path(__file__).resolve().parents[1]
NAMESPACES = [optaxclip, optaxclip.measure, optaxclip.threshold, optaxclip.scale]


def is_public(name, value):
    """Whether a name in a namespace is its own and not, like `jnp`, one it only uses."""
    if name.startswith("_"):
        return False
    owner = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return owner.split(".")[0] == "optaxclip"


PUBLIC = {
    f"{namespace.__name__}.{name}": value
    for namespace in NAMESPACES
    for name, value in vars(namespace).items()
    if is_public(name, value)
}
# Functions, and objects that are called like one (scale.strict); classes are not run.
FUNCTIONS = {
    name: value for name, value in PUBLIC.items() if callable(value) and not inspect.isclass(value)
}
VARIANTS = {
    name: value
    for name, value in vars(variants).items()
    if inspect.isfunction(value) and name[0] != "_"
}


VARIANTS["scale_by_stable_adam"] = optaxclip.scale_by_stable_adam

# Two moments belong together, as in optax.scale_by_adam.
POSITIONAL = {"stabilize_gradients": ["norm_decay"], "scale_by_stable_adam": ["b2", "eps"]}


def readme_rows():
    """The first column of the table of variants, as it stands in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Variants\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section, 'README.md has no section "Variants"'
    rows = [line for line in section[1].splitlines() if line.startswith("|")]
    return [row.split("|")[1].strip() for row in rows[2:]]


def test_the_lists_of_names_are_not_empty():
    """The tests below look at the variants, the rooms of the flow and what is in them."""
    assert {"optaxclip.clip", "optaxclip.metrics", "optaxclip.measure"} <= PUBLIC.keys()
    assert {"optaxclip.measure.by_label", "optaxclip.scale.strict"} <= FUNCTIONS.keys()
    assert {"optaxclip.threshold.until", "optaxclip.clip_by_norm"} <= FUNCTIONS.keys()
    assert not {"optaxclip.scale.jnp", "optaxclip.scale.annotations"} & PUBLIC.keys()
    assert "clip_by_global_norm" in VARIANTS


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    """Every public name has a docstring that a person wrote."""
    doc = inspect.getdoc(PUBLIC[name])
    assert doc
    # What NamedTuple writes in the absence of a docstring.
    assert not doc.startswith(f"{name.rpartition('.')[2]}(")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_show_an_example_and_their_arguments(name):
    """The docstring of every public function has an example and says what each argument is."""
    doc = inspect.getdoc(FUNCTIONS[name])
    assert re.search(r"^Example:\n(.*\n)*?\s+>>> ", doc, re.MULTILINE)
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    section = re.search(r"^Args:\n((?: +.*\n|\n)+)", doc + "\n", re.MULTILINE)
    documented = re.findall(r"^  (\w+): \S", section[1], re.MULTILINE) if section else []
    assert documented == list(parameters)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_take_their_threshold_first_and_the_rest_by_keyword(name):
    """A variant has one positional argument, with a default, and `nonfinite` and `record`."""
    first, *rest = inspect.signature(VARIANTS[name]).parameters.values()
    rest = [parameter for parameter in rest if parameter.name not in POSITIONAL.get(name, ())]
    assert first.kind is first.POSITIONAL_OR_KEYWORD
    assert isinstance(first.default, float)
    assert {parameter.kind for parameter in rest} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {parameter.name: parameter.default for parameter in rest}
    assert {"nonfinite": "zero", "record": True}.items() <= defaults.items()


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_exported(name):
    """Every variant is a name of the package itself."""
    assert getattr(optaxclip, name, None) is VARIANTS[name]


def test_every_variant_is_in_the_roster():
    """Laws, wrappers and meshes are tried on every variant."""
    assert {name.split()[0] for name in EVERY} == VARIANTS.keys()


def test_readme_lists_every_variant_with_its_threshold_and_no_other():
    """The table of variants in the README has one row per variant, with its true default."""
    expected = []
    for name, function in VARIANTS.items():
        first = next(iter(inspect.signature(function).parameters.values()))
        expected.append(f"`{name}({first.name}={first.default})`")
    assert sorted(readme_rows()) == sorted(expected)


def test_version_is_the_same_everywhere():
    """The package, its metadata and the changelog name one version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert optaxclip.__version__ == project["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{optaxclip.__version__}]" in changelog


def test_runtime_dependencies_are_jax_and_optax_only():
    """Installing the package installs JAX and Optax and nothing else of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in project["dependencies"]]
    assert sorted(names) == ["jax", "optax"]


def test_import_leaves_extras_alone():
    """Importing the package imports neither Flax nor Matplotlib nor TensorBoard."""
    program = (
        "import sys, optaxclip; print({'flax', 'matplotlib', 'tensorboard'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
