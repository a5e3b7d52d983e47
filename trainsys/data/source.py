"""From a config to global batches: ``Source.rows(step, rows)`` is a pure function of (seed, step, row)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainsys.config.run import DataConfig, RunConfig
from trainsys.data.cache import Progress, cached_tokens
from trainsys.data.corpus import Corpus, Segment, synthetic_corpus
from trainsys.data.documents import find_files, open_documents, refuse_split
from trainsys.data.megatron import open_megatron
from trainsys.data.packing import Batch, ConcatPacking, Counts, Packing, PadPacking, stack
from trainsys.data.permutation import permute
from trainsys.data.shards import SUFFIX, Shard, list_shards, open_shards, shard_fingerprint
from trainsys.data.tokenizer import load_tokenizer
from trainsys.errors import UserError


class Source:
    """The global batches of a run.

    Row r of step t is global sample number ``g = t * global_batch + r``, unless :meth:`go_on` says otherwise. Epoch
    ``g // n_samples`` visits every sample once, in an order that (seed, epoch) names (``data.permutation``) or,
    unshuffled, in corpus order. Nothing depends on the number of ranks, and nothing is carried from step to step.
    """

    def __init__(
        self,
        corpus: Corpus,
        packing: Packing,
        *,
        seq_len: int,
        global_batch: int,
        vocab: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.corpus = corpus
        self.packing = packing
        self.seq_len = seq_len
        self.global_batch = global_batch
        self.n_samples = packing.n_samples
        self._vocab = vocab
        self._seed = seed
        self._shuffle = shuffle
        self._from = (0, 0)

    def go_on(self, step: int, sample: int) -> None:
        """Row 0 of ``step`` is sample number ``sample``, and later ones follow: for a run that had batches of another
        size until then. Steps before it are no longer there."""
        self._from = (step, sample)

    def first_sample(self, step: int) -> int:
        """The number of row 0 of ``step``, which is how many samples the steps before it held."""
        first, sample = self._from
        assert step >= first, f"step {step} is before {first}, where this source begins"
        return sample + (step - first) * self.global_batch

    def samples(self, step: int, rows: Sequence[int]) -> NDArray[np.int64]:
        """Which samples (concat: windows; pad: documents) are ``rows`` of the global batch of ``step``."""
        index = np.array(rows, np.int64)
        assert index.size == 0 or (index.min() >= 0 and index.max() < self.global_batch)
        number = self.first_sample(step) + index
        if not self._shuffle:
            return number % self.n_samples
        epochs, within = np.divmod(number, self.n_samples)
        out = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(within[here], self.n_samples, self._seed, int(epoch))
        return out

    def rows(self, step: int, rows: Sequence[int]) -> Batch:
        """Some rows of the global batch of ``step``, in the order asked for."""
        samples = self.samples(step, rows).tolist()
        batch = stack([self.packing.row(s) for s in samples], self._sum(samples))
        largest = int(max(batch.tokens.max(), batch.labels.max()))
        if largest >= self._vocab or batch.tokens.min() < 0:
            wrong = largest if largest >= self._vocab else int(batch.tokens.min())
            raise UserError(
                f"{self.corpus.name}: token id {wrong} in step {step} is outside model.vocab={self._vocab}: "
                "the file is damaged or was made with another tokenizer"
            )
        return batch

    def batch(self, step: int) -> Batch:
        """The whole global batch of ``step``."""
        return self.rows(step, range(self.global_batch))

    def counts(self, step: int) -> Counts:
        """Counts of the whole global batch, from document boundaries alone: no token is read."""
        return self._sum(self.samples(step, range(self.global_batch)).tolist())

    def describe(self) -> dict[str, Any]:
        """What the run's record keeps of its data, fingerprint included."""
        return {
            **self.corpus.record,
            "name": self.corpus.name,
            "documents": self.corpus.n_docs,
            "tokens": self.corpus.n_tokens,
            "samples_per_epoch": self.n_samples,
            "steps_per_epoch": self.n_samples / self.global_batch,
            "packing": "concat" if isinstance(self.packing, ConcatPacking) else "pad",
            "shuffle": self._shuffle,
            "seed": self._seed,
        }

    def _sum(self, samples: Sequence[int]) -> Counts:
        total = Counts()
        for sample in samples:
            total += self.packing.count(sample)
        return total


def build_source(cfg: RunConfig, progress: Progress | None = None) -> Source:
    """Open (text: tokenize once) what ``cfg.data`` names. ``UserError`` for what the user can mend."""
    corpus = open_corpus(cfg, progress)
    if corpus.vocab_size is not None and corpus.vocab_size > cfg.model.vocab:
        raise UserError(
            f"model.vocab={cfg.model.vocab} is smaller than the {corpus.vocab_size} ids of {corpus.name} "
            f"(tokenizer {corpus.record.get('tokenizer', 'unknown')}); set model.vocab>={corpus.vocab_size}"
        )
    pack = ConcatPacking if cfg.data.packing == "concat" else PadPacking
    packing = pack(corpus, cfg.train.seq_len, cfg.data.document_mask, cfg.model.sliding_window)
    return Source(
        corpus,
        packing,
        seq_len=cfg.train.seq_len,
        global_batch=cfg.train.global_batch,
        vocab=cfg.model.vocab,
        seed=cfg.train.seed,
        shuffle=cfg.data.shuffle,
    )


def open_corpus(cfg: RunConfig, progress: Progress | None = None) -> Corpus:
    """The token corpus of ``cfg.data``, whatever its source."""
    data = cfg.data
    if data.source in ("synthetic", "megatron", "shards"):
        refuse_split(data)
    if data.source == "synthetic":
        return synthetic_corpus(cfg.model.vocab, cfg.train.seed)
    if data.source == "megatron":
        assert data.path is not None, "the config asks for a path"
        return open_megatron(data.path)
    if data.source == "shards":
        return _open_prepared(data)
    documents = open_documents(data)
    tokenizer = load_tokenizer(data.tokenizer)
    folder = cached_tokens(documents, tokenizer, data.cache_dir, progress)
    try:
        shards = open_shards(list_shards(folder))
    except UserError as error:
        raise UserError(f"{error}; it is a cache: delete {folder} and it is built again") from error
    record = {"source": data.source, **documents.record, "tokenizer": tokenizer.fingerprint}
    return _shard_corpus(documents.name, shards, record)


def _open_prepared(data: DataConfig) -> Corpus:
    path = data.path
    assert path is not None, "the config asks for a path"
    folder = Path(path).expanduser()
    paths = list_shards(folder) if folder.is_dir() else find_files(path, (SUFFIX,))
    if not paths:
        raise UserError(
            f"data.path={path}: no *{SUFFIX} in this folder; make them with 'trainsys data prepare'"
        )
    shards = open_shards(paths)
    made_with = shards[0].meta["tokenizer"]
    # The shards say which tokenizer made them; a config that names one on purpose must agree.
    if "tokenizer" in data.model_fields_set and load_tokenizer(data.tokenizer).fingerprint != made_with:
        raise UserError(
            f"data.tokenizer={data.tokenizer} did not make {path} (made with {made_with}); "
            "remove data.tokenizer or prepare the shards again"
        )
    return _shard_corpus(path, shards, {"source": "shards", "path": path, "tokenizer": made_with})


def _shard_corpus(name: str, shards: Sequence[Shard], record: dict[str, Any]) -> Corpus:
    meta = shards[0].meta
    record = {**record, "tokens_fingerprint": shard_fingerprint(shards)}
    record.setdefault("fingerprint", record["tokens_fingerprint"])
    segments = [Segment(shard.tokens, shard.doc_offsets) for shard in shards]
    # A stored id may exceed what the tokenizer claims only through damage: the larger of the two is the
    # bound.
    vocab = max(int(meta["vocab_size"]), max(shard.max_token for shard in shards) + 1)
    return Corpus(name, segments, int(meta["pad"]), vocab, record)
