"""The manual of the methods: what ``segdistill methods`` prints, and docs/methods.md."""

import argparse
import re
import sys
import textwrap

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from segdistill.commands.catalogue import Entry, entries, entry

EVIDENCE = {
    "official code": "the formula and its numbers were read in the authors' own code",
    "public code": "they were read in somebody else's public implementation, or the formula is common knowledge",
    "partly second-hand": "some parts were read in code, the others only in what third parties wrote about the paper",
    "reconstruction": "no code was found: the formula is put together from the abstract and texts about the paper",
}

VERBATIM = {"Example": "yaml", "Formula": "text"}  # section -> what it is written in

LEGEND = (
    "Default weight: the factor of all terms, then that of each term that has its own. "
    "0 is off; auto follows from other parameters."
)

INTRODUCTION = """\
<!-- Written by `segdistill methods --markdown > docs/methods.md` from the methods' own files: edit those. -->

# Methods

Offline methods: a frozen teacher teaches one student. Online methods: students trained together teach each other.
In the terminal, `segdistill methods` prints the table below and `segdistill methods apd` one method.

## In an experiment

An experiment in `params.yaml` has students and a list of methods. Any number of methods of one kind go together; their
weighted terms are added to what the labels teach, by default the cross-entropy:

```yaml
experiments:
  cwd_kd:
    students: {cnn: *cnn}
    methods:
      - {name: kd, temperature: 2.0}
      - {name: cwd, logits_weight: 0.0, feature_weight: 50.0, ramp: 0.1}
```

What is left out has the default below. The example of each method is an entry of `experiments`, too; `*cnn` and `*vit`
are the students that `params.yaml` calls so. A term whose weight is 0 is neither built nor computed, so an ablation is
a change of parameters. Offline methods need one student, online methods two or more; `methods: []` is the student
without distillation. Networks of any kind and size go together: features and logits (never probabilities) are resized,
and channels projected, inside the method. A coarser map is interpolated at the places of a finer one, and a finer one
is averaged over the cells of a coarser one, at every crop size. A pair that a method is not defined for is refused with
the reason.

## Weights

    loss = supervised * labels + sum over methods of  r * weight * term_weight * term
    labels = cross_entropy * ce + dice * dice + lovasz * lovasz, by default ce

* A *term* is raw: in float32 a mean over the valid pixels of the batch that a process holds, so that its size depends
  neither on the batch nor on the resolution, unless the method says otherwise. Raw and weighted terms are both logged.
* `weight` is the factor of all terms of a method that train the student, `<term>_weight` that of one of them.
* r rises linearly from 0 to 1 over the first part `ramp` of the budget; with `ramp: 0` it is 1 from the start. What
  trains a method's helpers alone (`apd`'s teacher head, `skd`'s critic) has r = 1 and no `weight`.
* Published weights belong to the reductions of the code they come from, and for the same loss these differ by four
  orders of magnitude. The defaults are published weights in our reduction; "Weights" under a method says how.
* For another data set or other networks, `segdistill calibrate --experiment NAME` measures the terms and prints the
  weights that give them a chosen strength beside the cross-entropy.

## What the labels teach

`distill.train.loss` says it for every experiment, with methods and without, `train_teacher.train.loss` for the teacher:

```yaml
loss: {cross_entropy: 1.0, class_weights: {name: median_frequency}, lovasz: 0.5}
loss: {ohem: {threshold: 0.7, min_kept: 10000}, dice: 1.0}
loss: {class_weights: {name: given, weights: {pedestrian: 5.0, sky: 0.5}}}
```

Every part is taken at the labels' size, over the pixels that have a label, void and images without masks left out, and
is logged under its own name (`train/loss/ce`, `dice`, `lovasz`). An auxiliary head has the same (`aux_ce`, ...), times
`auxiliary`. What a method compares with labels is its own affair. A part of weight 0 is not computed, but for the
cross-entropy. p is the softmax over classes, y the label of a pixel, w the weight of its class.

```text
ce                sum w(y) * -log p(y) / sum w(y), over all pixels, or with ohem over the hard ones
median_frequency  w(c) = median(f) / f(c), f(c) = pixels of c / pixels of the images that have c
effective_number  w(c) = (1 - beta) / (1 - beta^n(c)), n(c) = pixels of c, scaled to a mean of 1 over the classes
ohem              hard: p(y) < threshold; if they are fewer than min_kept an image, the hardest up to that number
dice              mean over c of 1 - 2 * sum p_c y_c / (sum p_c + sum y_c)
lovasz            mean over c of the Lovasz extension of 1 - IoU at the errors |y_c - p_c|
```

* Pixels are counted by `prepare`, in the labelled training images as they are stored; a class that none of them has is
  left out and weighs 0. Beta is 1 - 1 / N in the paper; left out, N is the pixels of a mean class. With the paper's
  0.9 to 0.9999, made for counts of images, all classes of many pixels weigh alike.
* Dice and Lovasz-softmax are means over the classes that the labels at hand have: of the pixels of a forward pass
  together, not image by image.
* **In parts.** A batch that is accumulated, or shared by processes, has the cross-entropy of the whole batch, class
  weights included: sums are divided by the weight of the labels in an average part. Which pixels are hard, Dice and
  Lovasz-softmax are not sums over pixels, so they go by the part: their value and gradient depend on how many parts
  there are.
* From Eigen and Fergus 2015, arXiv:1411.4734 (median frequency); Cui et al. 2019, arXiv:1901.05555 (effective number);
  Shrivastava et al. 2016, arXiv:1604.03540 (OHEM, of regions; pixels and the threshold are public segmentation code's);
  Milletari et al. 2016, arXiv:1606.04797 (Dice; there with squares below the line); Berman et al. 2018,
  arXiv:1705.08790 (Lovasz-softmax, classes of the batch).

## What a number obtained here is

Every method is a re-implementation, from equations and from the behaviour of public code; no code was copied. A result
is one of this re-implementation, not of the paper. How much is known of the original differs:

| evidence | meaning |
|---|---|
"""


def show_table(console: Console | None = None) -> None:
    """Prints a row for every method."""
    console = console or plain_console()
    table = plain_table()
    for column in ("method", "kind", "paper", "what it needs", "default weight", "evidence"):
        table.add_column(column, no_wrap=column in ("method", "kind"))
    for method in entries():
        cells = (method.name, method.kind, method.paper, method.needs, "\n".join(_weights(method)), method.evidence)
        table.add_row(*map(Text, cells), end_section=True)
    console.print(table)
    console.print(LEGEND)
    console.print("All are re-implementations. Formula, parameters and source of one: segdistill methods NAME")


def show_method(name: str, console: Console | None = None) -> None:
    """Prints all that is known of one method.

    Raises:
        UserError: there is none of that name.
    """
    console, method = console or plain_console(), entry(name)
    console.print(f"[bold]{method.name}[/bold]: {method.kind}; {method.paper}; evidence: {method.evidence}")
    console.print(Text(method.summary))
    for heading, text in {"Needs": method.needs, **_body(method), "Code": method.source}.items():
        console.print(f"\n[bold]{heading}[/bold]")
        verbatim = heading in VERBATIM
        paragraphs = [block if verbatim else _filled(block, console.width - 2) for block in text.split("\n\n")]
        # What is still wider than the terminal is for the terminal to break.
        console.print(Text(textwrap.indent("\n\n".join(paragraphs), "  ")), soft_wrap=True)
    table = plain_table()
    for column, width in {"parameter": None, "default": None, "allowed": 22, "meaning": None}.items():
        table.add_column(column, no_wrap=column == "parameter", max_width=width)
    for parameter in method.parameters:
        cells = (parameter.name, parameter.default, parameter.allowed, parameter.meaning)
        table.add_row(*map(Text, cells))
    console.print("\n[bold]Parameters[/bold]")
    console.print(table)


def markdown() -> str:
    """The whole of docs/methods.md."""
    methods = entries()
    blocks = [INTRODUCTION + "\n".join(row(level, meaning) for level, meaning in EVIDENCE.items())]
    blocks += ["## All of them", _summary(methods), LEGEND]
    blocks += [block for method in methods for block in _section(method)]
    return "\n\n".join(blocks) + "\n"


def _summary(methods: list[Entry]) -> str:
    lines = [
        row("method", "kind", "paper", "what it needs", "default weight", "evidence"),
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        name = f"[`{method.name}`](#{method.name})"
        weights = ", ".join(_weights(method))
        lines.append(row(name, method.kind, method.paper, method.needs, weights, method.evidence))
    return "\n".join(lines)


def _section(method: Entry) -> list[str]:
    source = f"[{method.source}](../{method.source})"
    facts = f"{method.kind.capitalize()}. Needs: {method.needs}. Evidence: {method.evidence}. Code: {source}"
    blocks = [f"## {method.name}", _prose(method.summary), _prose(f"{method.paper}. {facts}")]
    for heading, text in _body(method).items():
        blocks.append(f"**{heading}**")
        language = VERBATIM.get(heading)
        for block in [text] if language else text.split("\n\n"):
            verbatim = language or _is_layout(block)
            blocks.append(f"```{language or 'text'}\n{textwrap.dedent(block)}\n```" if verbatim else _prose(block))
    rows = [row("parameter", "default", "allowed", "meaning"), "|---|---|---|---|"]
    for parameter in method.parameters:
        rows.append(row(f"`{parameter.name}`", f"`{parameter.default}`", parameter.allowed, parameter.meaning))
    return [*blocks, "**Parameters**", "\n".join(rows)]


def _body(method: Entry) -> dict[str, str]:
    """The docstring's sections, with a word on what is inferred and the reference last."""
    body = {"Inferred": "Nothing is noted."} | method.sections
    ends = [heading for heading in ("Inferred", "Reference") if heading in body]
    return {heading: body[heading] for heading in [*(key for key in body if key not in ends), *ends]}


def _weights(method: Entry) -> list[str]:
    defaults = {term: "auto" if value == "null" else value for term, value in method.weights.items()}
    return [value if term == "weight" else f"{term} {value}" for term, value in defaults.items()]


def _is_layout(paragraph: str) -> bool:
    """Whether the line breaks and columns of a paragraph mean something."""
    return bool(re.search(r"^ {3}|\S {2,}\S", paragraph, re.MULTILINE))


def _filled(paragraph: str, width: int) -> str:
    """A paragraph broken at a width; layouts and lists stay as they are."""
    if _is_layout(paragraph) or re.match(r"[-*] ", paragraph):
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), width, break_long_words=False, break_on_hyphens=False)


def _prose(text: str) -> str:
    """Text for Markdown: what looks like a tag outside of code is none."""
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def row(*cells: str) -> str:
    """A line of a table in Markdown."""
    escaped = [_prose(cell).replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def plain_table() -> Table:
    """A table for the terminal, with a line under its head alone."""
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def plain_console() -> Console:
    """Standard output; 100 columns where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


def command(arguments: argparse.Namespace) -> None:
    """Prints the table, one method's page, or docs/methods.md."""
    if arguments.markdown:
        print(markdown(), end="")
    elif arguments.name:
        show_method(arguments.name)
    else:
        show_table()
