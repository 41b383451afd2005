"""What distillation_mix and pretraining_mix have in common: corpora in, packed tokens and mixture.json out."""

from pathlib import Path

from pipeline.artifacts import write_atomically
from pipeline.data.documents import load_documents, load_source_records
from pipeline.data.evaluation_sets import load_evaluation_ngrams, load_held_out_ids
from pipeline.data.mixtures import MIXTURE_FILE, MixtureRecord, SourceDocuments, build_mixture
from pipeline.data.packed import long_context_split, save_packed
from pipeline.model.checkpoint import load_tokenizer
from pipeline.stage import StageInputs, StageResult, Table
from pipeline.stages.configs import MixtureStage


def make_mixture(config: MixtureStage, inputs: StageInputs, out_dir: Path) -> StageResult:
    """Build one mixture with the parent's tokenizer and write it."""
    records = load_source_records(inputs["corpora"])
    mixture = build_mixture(
        {
            entry.source: SourceDocuments(
                documents=load_documents(inputs["corpora"], entry.source),
                domain=records[entry.source].domain,
                licence=records[entry.source].licence,
            )
            for entry in config.mixture.entries
        },
        config=config.mixture,
        tokenizer=load_tokenizer(inputs["parent_checkpoint"]),
        held_out_ids=load_held_out_ids(inputs["evaluation_sets"]),
        ngrams=load_evaluation_ngrams(inputs["evaluation_sets"]),
        report=lambda done, total: inputs.reporter.step(done, total, what="tokens"),
    )
    save_packed(out_dir, "train", mixture.train)
    save_packed(out_dir, "validation", mixture.validation)
    for sequence_length, packed in mixture.long_context.items():
        save_packed(out_dir, long_context_split(sequence_length), packed)
    record = mixture.record.model_dump_json(indent=1, exclude_defaults=True)
    write_atomically(out_dir / MIXTURE_FILE, record.encode())
    for source in mixture.record.sources:
        if source.is_exhausted:
            inputs.reporter.note(
                f"{source.source} ran dry: {source.share_got:.1%} of the tokens instead of {source.share_asked:.1%}"
            )
    return _result(mixture.record)


def _result(record: MixtureRecord) -> StageResult:
    sources = record.sources
    return StageResult(
        metrics={
            "num_tokens": record.num_tokens,
            "num_validation_tokens": record.num_validation_tokens,
            **{f"num_tokens_in_windows_of_{one.sequence_length}": one.num_tokens for one in record.long_context},
            "num_held_out_documents": sum(source.num_held_out for source in sources),
            "num_contaminated_documents": sum(source.num_contaminated for source in sources),
            "num_contaminated_documents_left": record.num_contaminated_documents_left,
            "vocab_size": record.vocab_size,
        },
        facts={"document_separator": record.separator},
        tables={
            "domains": _domain_table(record),
            "sources": Table.of(
                (
                    "source",
                    "domain",
                    "licence",
                    "share_asked",
                    "share_got",
                    "num_tokens",
                    "num_documents",
                    "num_validation_tokens",
                    "num_held_out",
                    "num_contaminated",
                    "num_checked",
                ),
                [
                    (
                        source.source,
                        source.domain,
                        source.licence,
                        round(source.share_asked, 4),
                        round(source.share_got, 4),
                        source.num_tokens,
                        source.num_documents,
                        source.num_validation_tokens,
                        source.num_held_out,
                        source.num_contaminated,
                        source.num_checked,
                    )
                    for source in sources
                ],
            ),
        },
    )


def _domain_table(record: MixtureRecord) -> Table:
    """Return the training tokens of each domain, its sources together."""
    tokens: dict[str, int] = {}
    documents: dict[str, int] = {}
    for source in record.sources:
        tokens[source.domain] = tokens.get(source.domain, 0) + source.num_tokens
        documents[source.domain] = documents.get(source.domain, 0) + source.num_documents
    rows = [
        (domain, count, round(count / record.num_tokens, 4), documents[domain])
        for domain, count in sorted(tokens.items(), key=lambda item: -item[1])
    ]
    return Table.of(("domain", "num_tokens", "share", "num_documents"), rows)
