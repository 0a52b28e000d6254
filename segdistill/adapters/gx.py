"""Great Expectations: tables and expectations in, verdicts that name rows and a folder of Data Docs out."""

import datetime
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# A stage reads no clock, so that equal data gives equal pages; they show this time as "not recorded".
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

Severity = Literal["critical", "warning"]


@dataclass(frozen=True)
class Expectation:
    """One expectation on one table; a ``critical`` one stops the pipeline, a ``warning`` is shown."""

    table: str
    kind: str  # class name in great_expectations.expectations
    arguments: Mapping[str, Any] = field(default_factory=dict)
    severity: Severity = "critical"
    notes: str = ""  # shown in Data Docs


@dataclass(frozen=True)
class Verdict:
    """What became of one expectation."""

    expectation: Expectation
    success: bool
    rows: tuple[int, ...]  # the rows of the table that failed; empty where the expectation is on the table as a whole


def validate(
    tables: Mapping[str, Sequence[Mapping[str, Any]]], expectations: Sequence[Expectation], docs: Path
) -> list[Verdict]:
    """Checks every expectation and builds Data Docs.

    Args:
        tables: rows of plain values by table name; a table has at least one row, and all its rows the same keys.
        expectations: what must hold, in the order of the verdicts.
        docs: the folder for Data Docs; the page to open is its ``index.html``.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read at import
    import great_expectations as gx
    import pandas
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    settings = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(),
        data_docs_sites={"docs": _site(docs)},
        progress_bars=ProgressBarsConfig(globally=False),
        analytics_enabled=False,
    )
    context = gx.get_context(mode="ephemeral", project_config=settings)
    source = context.data_sources.add_pandas("dataset")
    verdicts: dict[int, Verdict] = {}
    for table, rows in tables.items():
        numbers = [number for number, expectation in enumerate(expectations) if expectation.table == table]
        frame = pandas.DataFrame([{"row": number, **row} for number, row in enumerate(rows)])
        suite = context.suites.add(gx.ExpectationSuite(name=table))
        for number in numbers:
            suite.add_expectation(_build(expectations[number], number))
        batch = source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("whole")
        definition = gx.ValidationDefinition(name=table, data=batch, suite=suite)
        result = context.validation_definitions.add(definition).run(
            batch_parameters={"dataframe": frame},
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]},  # type: ignore[arg-type]
            run_id=RunIdentifier(run_name="validate", run_time=EPOCH),
        )
        for outcome in result.results:
            number = outcome.expectation_config.meta["number"]  # type: ignore[union-attr, index]
            verdicts[number] = _verdict(expectations[number], outcome)
    context.build_data_docs()
    for page in sorted(docs.rglob("*.html")):
        page.write_text(_settle(page.read_text(encoding="utf-8"), page.relative_to(docs)), encoding="utf-8")
    return [verdicts[number] for number in range(len(expectations))]


def _build(expectation: Expectation, number: int) -> Any:
    import great_expectations.expectations as kinds

    return getattr(kinds, expectation.kind)(
        **expectation.arguments, severity=expectation.severity, notes=expectation.notes, meta={"number": number}
    )


def _verdict(expectation: Expectation, outcome: Any) -> Verdict:
    # An expectation that could not be computed carries a trace, directly or by metric.
    failures = [outcome.exception_info or {}, *(outcome.exception_info or {}).values()]
    if any(isinstance(failure, dict) and failure.get("raised_exception") for failure in failures):
        raise RuntimeError(f"{expectation.kind} on {expectation.table} could not be computed: {outcome.exception_info}")
    rows = [int(entry["row"]) for entry in outcome.result.get("unexpected_index_list") or []]
    return Verdict(expectation, bool(outcome.success), tuple(sorted(set(rows))))


def _site(docs: Path) -> dict[str, Any]:
    return {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.absolute())},
    }


def _settle(html: str, page: Path) -> str:
    """A page that is the same for the same data, and that does not tell its maker's server when someone opens it."""
    logo = "../" * (len(page.parts) - 1) + "static/images/logo-long.png"
    html = re.sub(r"https://great-expectations-web-assets[^\s\"')]*", logo, html)
    html = re.sub(r"1970-01-01[T ]00:00:00(Z| UTC)", "not recorded", html)
    html = re.sub(r"\b20\d{6}T\d{6}\.\d{6}Z\b", "not recorded", html)  # when the table was handed over
    uuid = r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"  # names of parts of the page
    names: dict[str, str] = {}
    return re.sub(uuid, lambda match: names.setdefault(match[0], str(len(names))), html)
