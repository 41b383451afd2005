"""corpora: the documents of every source of the recipe, one Parquet file each, with licence and counts."""

from pathlib import Path

from pipeline.artifacts import write_atomically
from pipeline.data.documents import SOURCES_FILE, SourceRecord, SourceRecords, write_documents
from pipeline.data.sources import read_source, source_licence, source_origin
from pipeline.recipe import SourceConfig
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import CorporaStage


def run(config: CorporaStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Read every source and write its documents."""
    sources = config.corpora.sources
    records = []
    for index, source in enumerate(sources, start=1):
        inputs.reporter.note(f"reading {source.name}")
        records.append(_write_source(source, inputs=inputs, out_dir=out_dir))
        inputs.reporter.step(index, len(sources), what="sources")
    contents = SourceRecords(sources=tuple(records))
    write_atomically(out_dir / SOURCES_FILE, contents.model_dump_json(indent=1).encode())
    return StageResult(
        metrics={
            "num_sources": len(records),
            "num_documents": sum(record.num_documents for record in records),
            "num_characters": sum(record.num_characters for record in records),
            "min_documents_per_source": min(record.num_documents for record in records),
        },
        tables={
            "sources": Table.of(
                ("source", "domain", "licence", "num_documents", "num_characters", "origin"),
                [
                    (item.name, item.domain, item.licence, item.num_documents, item.num_characters, item.origin)
                    for item in records
                ],
            )
        },
    )


def _write_source(source: SourceConfig, *, inputs: StageInputs, out_dir: Path) -> SourceRecord:
    documents = list(read_source(source, downloads=inputs.downloads))
    write_documents(out_dir / f"{source.name}.parquet", documents)
    return SourceRecord(
        name=source.name,
        domain=source.domain,
        licence=source_licence(source),
        origin=source_origin(source),
        num_documents=len(documents),
        num_characters=sum(len(document.text) for document in documents),
    )
