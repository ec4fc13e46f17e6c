"""What is in a compiled program: kernels, fusions and collectives, counted in its HLO text."""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

# An instruction that launches nothing by itself: it names, groups or calls.
FREE = {
    "add-dependency", "after-all", "async-start", "async-update", "bitcast", "call", "conditional",
    "constant", "domain", "get-tuple-element", "opt-barrier", "parameter", "partition-id",
    "replica-id", "tuple", "while",
}  # fmt: skip
COLLECTIVES = {
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
}  # fmt: skip

HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.-]+)\s.*->.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT\s+)?%?[\w.-]+\s+=.*?\s([a-z][a-z0-9-]*)\((.*)$")
BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=([^,\s]+))")
CALLED = re.compile(r"(?:body|condition|to_apply|calls)=([^,\s]+)")


class Counts(NamedTuple):
    """Of the instructions that run as kernels; a loop's body counts once.

    Those inside a fusion, or inside the function that a reduction applies, are part of one kernel.
    """

    kernels: int  # in every step
    branch_kernels: int  # only where a `lax.cond` takes their branch
    fusions: int  # in every step
    collectives: dict[str, int]  # in every step, by operation
    branch_collectives: dict[str, int]


def count(text: str) -> Counts:
    """Counts in the text of a compiled module, such as `compiled.as_text()`."""
    computations, entry = parse(text)
    found = {False: collections.Counter[str](), True: collections.Counter[str]()}
    waiting, seen = [(entry, False)], set()
    while waiting:
        name, in_branch = waiting.pop()
        if (name, in_branch) in seen:
            continue
        seen.add((name, in_branch))
        for opcode, rest in computations.get(name, []):
            if opcode not in FREE and not opcode.endswith("-done"):
                found[in_branch][opcode.removesuffix("-start")] += 1
            elif opcode == "conditional":
                names = ",".join(a or b for a, b in BRANCHES.findall(rest))
                waiting += [(each.strip(" %"), True) for each in names.split(",")]
            elif opcode in ("while", "call", "async-start"):
                waiting += [(each.lstrip("%"), in_branch) for each in CALLED.findall(rest)]
    every, branch = found[False], found[True]
    collectives = lambda counter: {name: counter[name] for name in sorted(COLLECTIVES & {*counter})}
    return Counts(
        every.total(), branch.total(), every["fusion"], collectives(every), collectives(branch)
    )


def parse(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """The instructions of every computation, as opcode and what follows; and which is run."""
    computations: dict[str, list[tuple[str, str]]] = {}
    inside: list[tuple[str, str]] = []
    entry = ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            inside = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := INSTRUCTION.match(line):
            inside.append((instruction[1], instruction[2]))
    return computations, entry
