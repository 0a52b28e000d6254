"""The stage ``validate``: every file of the data set is looked at before anything is built on it."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from segdistill.config import Fraction, config
from segdistill.data.settings import Workers
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.files import new_folder
from segdistill.report.highlights import Highlights

if TYPE_CHECKING:
    from segdistill.data.layouts import Layout
    from segdistill.report.validation import Example
    from segdistill.stages._rules import Tables

AtLeastOne = Annotated[int, Field(ge=1, le=10**9)]
MOST_SENTENCES = 50  # of one rule on a page; summary.json has them all
EXAMPLES = 6  # training images on the page


@config
class MinSamples:
    """Samples that each split must have; an empty split is always an error."""

    train: AtLeastOne
    """Least number of images with masks in train."""

    val: AtLeastOne
    """The same of val."""

    test: AtLeastOne
    """The same of test."""


@config
class Config:
    """Section ``validate`` of params.yaml."""

    layout: str
    """How the data set is laid out: folder, or a published data set's own layout, such as cityscapes."""

    min_samples: MinSamples
    """Fewer samples than this in a split stop the pipeline."""

    max_ignore_fraction: Fraction
    """A larger mean share of ignored pixels in any split stops the pipeline."""

    min_class_share: Fraction
    """A class with a smaller share of the labelled train pixels is warned about."""

    workers: Workers
    """Processes; 0 uses all cores."""


def run(config: Config, *, data: Path, report: Path, tracker: Tracker) -> None:
    """Writes ``report``: ``summary.json``, ``summary.md``, ``summary.html`` and ``data_docs/index.html``.

    Args:
        config: the stage's parameters.
        data: the data set.
        report: the folder to write; it is complete even when the data set fails.
        tracker: gets the number of samples, failures and warnings.

    Raises:
        UserError: a critical expectation failed; the sentence names the first file and its fault.
    """
    from segdistill.adapters import gx
    from segdistill.data.checks import inspect
    from segdistill.data.layouts import open_layout
    from segdistill.data.parallel import progress
    from segdistill.report.validation import page
    from segdistill.stages import _rules

    layout = open_layout(config.layout, data)
    samples = [sample for split in layout.own_splits for sample in layout.samples(split)]
    if not samples:
        raise layout.without_samples()
    facts = list(progress(inspect(layout, samples, workers=config.workers), "validate", len(samples)))
    if "test" not in layout.own_splits:
        facts += [replace(fact, split="test") for fact in facts if fact.split == layout.tested_on]
    tables, rules = _rules.tables(layout, facts, config), _rules.rules(config, layout.legend.mask_kinds)
    with new_folder(report) as partial:
        verdicts = gx.validate(tables, [rule.expectation for rule in rules], partial / "data_docs")
        judged = list(zip(rules, verdicts, strict=True))
        findings = [_finding(rule, verdict, tables, data) for rule, verdict in judged if not verdict.success]
        summary = _summarise(config.layout, tables, findings)
        summary["checks"] = [
            {"rule": rule.title, "table": rule.table, "severity": rule.severity, "success": verdict.success}
            for rule, verdict in judged
        ]
        summary["values"] = _rules.values(layout, facts)
        summary["images"] = _rules.usual_pixels(facts)
        (partial / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (partial / "summary.md").write_text(_markdown(summary, data), encoding="utf-8")
        html = page(summary, data.name, layout.legend.colors, _examples(layout), most=MOST_SENTENCES)
        (partial / "summary.html").write_text(html, encoding="utf-8")
    counts = {kind: sum(len(finding["sentences"]) for finding in summary[kind]) for kind in ("failures", "warnings")}
    sizes = {f"data/samples/{split}": count for split, count in summary["samples"].items()}
    tracker.metrics({**sizes, **{f"data/{kind}": count for kind, count in counts.items()}})
    tracker.artifact(report / "summary.md", "validation")
    logger = logging.getLogger(__name__)
    for finding in summary["warnings"]:
        for sentence in finding["sentences"][:MOST_SENTENCES]:
            logger.warning("warning: %s", sentence)
    if not summary["success"]:
        raise UserError(_verdict_sentence(summary["failures"], report))
    images = ", ".join(f"{split} {count}" for split, count in summary["samples"].items())
    told = f"{counts['warnings']} warnings" if counts["warnings"] else "no warning"
    logger.info(
        "%s is sound: %d images (%s) with %s, %d classes; %d checks passed, %s; see %s",
        data, len(samples), images, summary["images"], len(summary["classes"]),
        sum(verdict.success for verdict in verdicts), told, report / "summary.html",
    )  # fmt: skip


def _examples(layout: "Layout") -> "Iterator[Example]":
    """Some evenly spread training images with their classes, of those that can be read."""
    from PIL import Image

    from segdistill.data.checks import load_sample
    from segdistill.data.decoding import BadFile
    from segdistill.report.pictures import evenly_spread, visible
    from segdistill.report.validation import example

    samples = [sample for sample in layout.samples("train") if sample.mask]
    for index in evenly_spread(len(samples), EXAMPLES) if samples else ():
        with contextlib.suppress(BadFile, OSError, UserError):  # a finding says so
            _, pixels, labels = load_sample(samples[index], layout.legend)
            yield example(samples[index].id, Image.fromarray(visible(pixels)), labels, layout.legend.colors)


def _finding(rule: Any, verdict: Any, tables: "Tables", data: Path) -> dict[str, Any]:
    """What is wrong by a rule that does not hold, ready for JSON."""
    rows = [tables[rule.table][number] for number in verdict.rows]
    names = [row[rule.subject] for row in rows]
    subjects = [f"class '{name}'" if rule.table == "classes" else (data / name).as_posix() for name in names]
    return {
        "rule": rule.title,
        "severity": rule.severity,
        "table": rule.table,
        "expectation": rule.kind,
        "names": subjects,
        "sentences": [f"{subject}: {rule.problem(row)}" for subject, row in zip(subjects, rows, strict=True)],
    }


def _summarise(layout: str, tables: "Tables", findings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    failures = [finding for finding in findings if finding["severity"] == "critical"]
    return {
        "success": not failures,
        "layout": layout,
        "samples": {row["split"]: row["samples"] for row in tables["splits"]},
        "ignore_fraction": {row["split"]: row["ignore_fraction"] for row in tables["splits"]},
        "failures": failures,
        "warnings": [finding for finding in findings if finding["severity"] == "warning"],
        "classes": tables["classes"],
    }


def _verdict_sentence(failures: Sequence[dict[str, Any]], report: Path) -> str:
    more = len({name for finding in failures for name in finding["names"]}) - 1
    one = "1 more file fails" if more == 1 else f"{more} more files fail"
    return f"{failures[0]['sentences'][0]}; {f'{one}, ' if more else ''}see {report / 'summary.md'}"


def _markdown(summary: dict[str, Any], data: Path) -> str:
    outcome = "passed" if summary["success"] else "FAILED"
    lines = [f"# Validation of {data}: {outcome}", ""]
    lines += [f"Images: {summary['images'] or 'none that can be read'}.", ""]
    lines += ["| split | samples | ignored pixels |", "| --- | ---: | ---: |"]
    for split, count in summary["samples"].items():
        ignored = summary["ignore_fraction"][split]
        lines.append(f"| {split} | {count} | {'' if ignored is None else f'{ignored:.1%}'} |")
    lines += ["", "| class | train images | val images | test images | share of train pixels |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for row in summary["classes"]:
        images = " | ".join(str(row[f"{split}_images"]) for split in ("train", "val", "test"))
        lines.append(f"| {_cell(row['name'])} | {images} | {row['train_share'] or 0:.2%} |")
    lines += ["", "| stored value | read as | train pixels | val pixels | test pixels |"]
    lines += ["| ---: | --- | ---: | ---: | ---: |"]
    for row in summary["values"]:
        pixels = " | ".join(str(row[f"{split}_pixels"]) for split in ("train", "val", "test"))
        lines.append(f"| {row['value']} | {_cell(row['read_as'])} | {pixels} |")
    for kind in ("failures", "warnings"):
        lines += ["", f"## {kind.capitalize()}", ""] + ([] if summary[kind] else ["None."])
        for finding in summary[kind]:
            lines.append(f"**{finding['rule']}**: {len(finding['sentences'])} found in the table `{finding['table']}`.")
            lines += ["", *(f"* {sentence}" for sentence in finding["sentences"][:MOST_SENTENCES])]
            hidden = len(finding["sentences"]) - MOST_SENTENCES
            lines += [f"* and {hidden} more: see summary.json"] * (hidden > 0) + [""]
    return "\n".join([*lines, "", "Every expectation and its values: data_docs/index.html", ""])


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """The summary, as Markdown and as a page of its own."""
    page, summary = ((paths["report"] / f"summary.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    return Highlights(page=page, summary=summary)
