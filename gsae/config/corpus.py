"""Settings of the text. Out: `CorpusConfig`."""

from dataclasses import dataclass, field
from typing import Literal

from gsae.config.rules import require


@dataclass(frozen=True)
class DataSetConfig:
    """Which part of a data set of the library `datasets` is read; used only by `corpus.format: datasets`."""

    subset: str | None = None
    """Its subset (the library's config name), e.g. `20231101.en`; null takes the default one."""
    split: str = "train"
    """The library's split. A directory that was saved with one split alone is that one."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null takes the default branch as it is. The commit is part of the corpus's identity."""
    streaming: bool = True
    """Whether it is read over the network as it is needed; false downloads it into the library's cache first. The documents are the
    same."""


@dataclass(frozen=True)
class CorpusConfig:
    """Where the text comes from, and which part of it is training text and which held out."""

    format: Literal["mediawiki", "fever", "jsonl", "text", "parquet", "datasets"] = "mediawiki"
    """Format of the text: a MediaWiki XML dump (.xml or .xml.bz2), FEVER wiki pages (wiki-pages.zip or its directory),
    .jsonl files (one object a line), plain text files (one document a file), .parquet files, or a data set of the library `datasets`."""
    path: str = ""
    """File, directory or glob pattern (`*`, `**`) of the text; of a data set, its name on the hub (`OWNER/NAME`) or a directory."""
    text_column: str = "text"
    """Column (key) of the text, a string in every row: jsonl, parquet and datasets only."""
    id_column: str | None = None
    """Column (key) of the documents' ids: jsonl, parquet and datasets only. Null takes `id` where there is one, and names a row without
    by its file and number."""
    dataset: DataSetConfig = field(default_factory=DataSetConfig)
    """Used only by `format: datasets`."""
    max_documents: int | None = None
    """Number of documents to take, chosen by a seeded hash of their ids over the whole corpus; null takes all."""
    max_document_characters: int | None = None
    """Characters to keep of each document, from its start; null keeps all."""
    held_out_fraction: float = 0.01
    """Share of documents (0..1) held out for evaluation, chosen by a seeded hash of their ids; never harvested."""
    piece_characters: int = 2000
    """Longest piece of a document, in characters; pieces are cut at whitespace and dealt to lanes."""
    num_lanes: int = 64
    """Number of lanes the corpus is dealt to; the number of ranks in a group must divide it."""
    detokenise: bool = False
    """FEVER only: undo Penn Treebank tokens (`-LRB-`, spaces before punctuation)."""
    parts: int = 1
    """For a corpus whose activations do not fit on the disk: number of parts that its training documents are cut into by a seeded hash
    of their ids. Each is harvested into a store of its own, at most two exist at a time, and one is deleted when every run has a
    checkpoint beyond it. 1 harvests all into one store, which is kept."""
    seed: int = 0
    """Seed of the selection, of the training / held-out split and of the parts."""

    def __post_init__(self) -> None:
        require(0 < self.held_out_fraction < 1, f"corpus.held_out_fraction is {self.held_out_fraction}; give a share between 0 and 1")
        for name in ("piece_characters", "num_lanes", "parts"):
            require(getattr(self, name) >= 1, f"corpus.{name} is {getattr(self, name)}; give a positive number")
        for name in ("max_documents", "max_document_characters"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"corpus.{name} is {value}; give a positive number, or null for no limit")
        require(bool(self.text_column), "corpus.text_column is empty; name the column of the text")
        require(self.id_column != "", "corpus.id_column is empty; name the column of the ids, or null for `id` where there is one")
        names_columns = self.text_column != "text" or self.id_column is not None
        require(
            not names_columns or self.format in ("jsonl", "parquet", "datasets"),
            f"corpus.text_column and corpus.id_column do not go with corpus.format {self.format!r}; leave them out",
        )
        require(
            self.format == "datasets" or self.dataset == DataSetConfig(),
            f"corpus.dataset does not go with corpus.format {self.format!r}; leave it out, or set corpus.format: datasets",
        )
