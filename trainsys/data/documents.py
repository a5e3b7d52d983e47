"""Text sources: each gives its documents in a fixed order, and a fingerprint of where they come from."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from isal import igzip, igzip_lib

from trainsys.config.run import DataConfig
from trainsys.errors import UserError
from trainsys.rank_lists import first_few

# Not read from the standard library: tests (large, odd encodings), what pip installs, and what differs
# between two builds or set-ups of one Python version.
_SKIP_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SKIP_STEMS = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")
_VALID_SHARE = 20  # one file in this many is for validation


class Documents(Protocol):
    """``fingerprint`` changes when the text may have: it is the key of the token cache."""

    name: str

    @property
    def record(self) -> dict[str, Any]: ...

    def fingerprint(self) -> str: ...

    def __iter__(self) -> Iterator[str]: ...


class StdlibText:
    """The ``.py`` sources of the running Python's standard library, a file a document, in name order.

    A file belongs to ``valid`` when a hash of its name says so (about one in 20), so the split does not
    move when other files come and go. The text depends on the Python version: the record holds version and
    content hash.
    """

    def __init__(self, split: str, root: Path | None = None) -> None:
        if split not in ("train", "valid"):
            raise UserError(f"data.split={split}: source stdlib has 'train' and 'valid'")
        self.root = root or Path(sysconfig.get_paths()["stdlib"])
        self.name = f"stdlib:{split}"
        self._files = [name for name in _stdlib_files(self.root) if _is_valid(name) == (split == "valid")]
        if not self._files:
            raise UserError(
                f"{self.root}: no standard-library sources here (stripped or zipped Python); "
                "set data.source=text and data.path"
            )
        self._fingerprint: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        return {
            "python": sys.version.split()[0],
            "files": len(self._files),
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name in self._files:
                content = (self.root / name).read_bytes()
                digest.update(f"{name}\0{len(content)}\0".encode() + content)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def __iter__(self) -> Iterator[str]:
        for name in self._files:
            yield (self.root / name).read_bytes().decode("utf-8", "replace")


def _stdlib_files(root: Path) -> list[str]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in _SKIP_FOLDERS and not s.startswith("config-")]
        found += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in names
            if name.endswith(".py") and not name.startswith(_SKIP_STEMS)
        ]
    return sorted(found)


def _is_valid(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % _VALID_SHARE == 0


@dataclass
class LocalFiles(ABC):
    """Documents in local files.

    The fingerprint is each file's path, size and times of change, not its content: hashing a large corpus
    at every start would cost more than the check is worth.
    """

    name: str
    paths: Sequence[Path]
    record: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(sorted(self.record.items())).encode())
        for path in self.paths:
            stat = path.stat()
            digest.update(
                f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\n".encode()
            )
        return digest.hexdigest()

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            try:
                yield from self.read(path)
            except OSError as error:
                raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
            # isal declares the class as an instance, hence the ignore.
            except (EOFError, igzip_lib.IsalError) as error:  # type: ignore[misc]
                raise UserError(f"{path}: truncated or damaged gzip file: {error}") from error

    @abstractmethod
    def read(self, path: Path) -> Iterator[str]:
        """The documents of one file, in order."""


class TextFiles(LocalFiles):
    """UTF-8 text, a file a document."""

    def read(self, path: Path) -> Iterator[str]:
        try:
            yield path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from error


@dataclass
class JsonLines(LocalFiles):
    """One JSON object a line, its ``text_key`` a document; blank lines are skipped, ``.gz`` is unpacked."""

    text_key: str = "text"

    def read(self, path: Path) -> Iterator[str]:
        opener: Any = igzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:  # JSON and UTF-8 mistakes alike
                    raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
                if not isinstance(record, dict):
                    raise UserError(f"{path}:{number}: the line is {_kind(record)}, not an object with data.text_key")
                if self.text_key not in record:
                    raise UserError(
                        f"{path}:{number}: no key data.text_key={self.text_key}; the line has: {first_few(record)}"
                    )
                yield _text(record[self.text_key], self.text_key, f"{path}:{number}")


@dataclass
class Parquet(LocalFiles):
    """A string column of parquet files, a value a document; read a row group at a time (parquet extra)."""

    text_key: str = "text"

    def read(self, path: Path) -> Iterator[str]:
        parquet = _import_extra("pyarrow.parquet", "parquet", "data.source=parquet")
        try:
            file = parquet.ParquetFile(path)
        except ValueError as error:  # pyarrow.ArrowInvalid
            raise UserError(f"{path}: not a parquet file: {error}") from error
        with file:
            if self.text_key not in file.schema_arrow.names:
                raise UserError(
                    f"{path}: no column data.text_key={self.text_key}; "
                    f"the file has: {', '.join(file.schema_arrow.names)}"
                )
            for group in range(file.num_row_groups):
                for value in file.read_row_group(group, [self.text_key]).column(0).to_pylist():
                    yield _text(value, self.text_key, f"{path}: row group {group}")


class HubDataset:
    """A Hugging Face dataset (hf extra): a hub name, ``name:configuration``, or a local folder of one."""

    def __init__(self, path: str, split: str, text_key: str) -> None:
        datasets = _import_extra("datasets", "hf", "data.source=hf")
        self.name = f"hf:{path}:{split}"
        self._text_key = text_key
        try:
            self._rows = _load_dataset(datasets, path, split)
        except Exception as error:  # offline, unknown name or split, permission: one line either way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"data.path={path} split={split}: cannot load dataset: {reason}") from error
        if text_key not in self._rows.column_names:
            raise UserError(
                f"data.path={path}: no column data.text_key={text_key}; "
                f"the dataset has: {', '.join(self._rows.column_names)}"
            )
        self.record = {"rows": len(self._rows), "dataset_fingerprint": self._rows._fingerprint}

    def fingerprint(self) -> str:
        return hashlib.sha256(
            f"{self.name}\0{self._text_key}\0{self._rows._fingerprint}".encode()
        ).hexdigest()

    def __iter__(self) -> Iterator[str]:
        for number, row in enumerate(self._rows):
            yield _text(row[self._text_key], self._text_key, f"{self.name}: row {number}")


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: data.text_key={key} is {_kind(value)} there, not text; leave such records out")
    return value


def _kind(value: object) -> str:
    """What JSON calls it."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "text" if isinstance(value, str) else type(value).__name__)


def _load_dataset(datasets: Any, path: str, split: str) -> Any:
    if Path(path).is_dir() and any((Path(path) / f).is_file() for f in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(path)
        if not isinstance(saved, dict):
            if split != "train":
                raise ValueError("this folder holds one unnamed split; leave data.split=train")
            return saved
        if split not in saved:
            raise ValueError(f"the folder has the splits {', '.join(saved)}")
        return saved[split]
    name, _, configuration = path.partition(":") if not Path(path).exists() else (path, "", "")
    return datasets.load_dataset(name, configuration or None, split=split)


def open_documents(data: DataConfig) -> Documents:
    """The text that ``data`` names. ``UserError``: nothing there, no such split, a missing extra."""
    if data.source == "stdlib":
        return StdlibText(data.split)
    path = data.path
    assert path is not None, "the config asks for a path"
    if data.source == "hf":
        return HubDataset(path, data.split, data.text_key)
    refuse_split(data)
    record: dict[str, Any] = {"path": path}
    if data.source == "text":
        return TextFiles(path, find_files(path, (".txt",)), record)
    record["text_key"] = data.text_key
    if data.source == "jsonl":
        return JsonLines(path, find_files(path, (".jsonl", ".jsonl.gz")), record, data.text_key)
    assert data.source == "parquet", f"{data.source} is no text source"
    return Parquet(path, find_files(path, (".parquet",)), record, data.text_key)


def refuse_split(data: DataConfig) -> None:
    """Files have no splits: another name than the default would be ignored, so it is refused."""
    if data.split != "train":
        raise UserError(
            f"data.split={data.split}: source {data.source} has no splits; "
            "point data.path at the files of that split"
        )


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """A file, all files with one of ``suffixes`` in a folder and below, or a glob; in name order."""
    where = Path(path).expanduser()
    if where.is_file():
        return [where]
    if where.is_dir():
        found = sorted(p for p in where.rglob("*") if p.is_file() and p.name.endswith(suffixes))
        if not found:
            raise UserError(f"data.path={path}: no {' or '.join('*' + s for s in suffixes)} in this folder")
        return found
    found = sorted(Path(p) for p in glob.glob(str(where), recursive=True) if Path(p).is_file())
    if not found:
        raise UserError(f"data.path={path}: no such file or folder, and no file matches it as a glob")
    return found


def _import_extra(module: str, extra: str, setting: str) -> Any:
    try:
        __import__(module)
    except ImportError as error:
        raise UserError(f"{setting} needs '{module.split('.')[0]}': pip install trainsys[{extra}]") from error
    return sys.modules[module]
