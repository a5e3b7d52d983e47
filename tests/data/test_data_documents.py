from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from trainsys.config.run import DataConfig
from trainsys.data.documents import StdlibText, open_documents
from trainsys.data.source import build_source
from trainsys.data.tokenizer import ByteTokenizer
from trainsys.errors import UserError


def read(source: Any, path: Path | str | None, **more: Any) -> list[str]:
    return list(open_documents(DataConfig(source=source, path=None if path is None else str(path), **more)))


def test_stdlib_is_this_pythons_sources_split_by_name() -> None:
    train, valid = StdlibText("train"), StdlibText("valid")
    text = (train.root / "abc.py").read_text("utf-8")
    assert text in list(train) or text in list(valid)
    names, others = set(train._files), set(valid._files)
    assert not names & others
    assert {"json/decoder.py", "argparse.py"} <= names | others
    assert 0.01 < len(others) / len(names | others) < 0.12
    assert not any("site-packages" in n or "/test/" in n or n.startswith("test/") for n in names | others)
    assert train.record["fingerprint"] == StdlibText("train").fingerprint() != valid.fingerprint()
    assert train.record["python"] == sys.version.split()[0]


def test_stdlib_fingerprint_follows_content(tmp_path: Path) -> None:
    names = [f"module{i}.py" for i in range(20)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("no")
    (tmp_path / "sitecustomize.py").write_text("no")
    (tmp_path / "notes.txt").write_text("no")
    documents = StdlibText("train", tmp_path)
    assert set(documents) <= {f"# {name}" for name in names}
    first = documents.fingerprint()
    assert StdlibText("train", tmp_path).fingerprint() == first
    changed = tmp_path / documents._files[0]
    changed.write_text("# MODULE")
    assert StdlibText("train", tmp_path).fingerprint() != first


def test_stdlib_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="source stdlib has 'train' and 'valid'"):
        read("stdlib", None, split="test")
    with pytest.raises(UserError, match="no standard-library sources here"):
        StdlibText("train", tmp_path)


def test_text_file_folder_and_glob(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bé")
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "c.md").write_text("c")
    assert read("text", tmp_path / "b.txt") == ["bé"]
    assert read("text", tmp_path) == ["bé", "a"]
    assert read("text", tmp_path / "*.md") == ["c"]
    assert read("text", tmp_path / "c.md") == ["c"]


def test_jsonl_plain_and_gzipped(tmp_path: Path) -> None:
    lines = '{"text": "one", "n": 1}\n\n{"n": 2, "text": "zwei\\nZeilen"}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read("jsonl", tmp_path) == ["one", "zwei\nZeilen"] * 2
    assert read("jsonl", tmp_path / "a.jsonl", text_key="text") == ["one", "zwei\nZeilen"]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": "cut', r"a\.jsonl:2: not valid JSON"),
        ('{"body": "x", "id": 1}', r"a\.jsonl:2: no key data\.text_key=text; the line has: body, id"),
        ('{"text": 7}', r"a\.jsonl:2: data\.text_key=text is a number there, not text"),
        ('{"text": null}', r"a\.jsonl:2: data\.text_key=text is null there, not text; leave such records out"),
        ("[1]", r"a\.jsonl:2: the line is a list, not an object with data\.text_key"),
    ],
)
def test_bad_json_line_names_file_and_line(tmp_path: Path, line: str, match: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=match):
        read("jsonl", tmp_path)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not valid JSON: 'utf-8'"):
        read("jsonl", tmp_path)
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 3"):
        read("text", tmp_path)


def test_damaged_gzip(tmp_path: Path) -> None:
    good = gzip.compress(json.dumps({"text": "x" * 500}).encode())
    for name, raw in [
        ("cut", good[:-12]),
        ("noise", b"not gzip at all"),
        ("flip", good[:12] + b"\xff" * 9 + good[21:]),
    ]:
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(raw)
        with pytest.raises(UserError, match=str(path)):
            read("jsonl", path)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet extra not installed")
    import pyarrow.parquet as pq

    texts = [f"document {i}" for i in range(10)]
    pq.write_table(pa.table({"text": texts, "n": range(10)}), tmp_path / "a.parquet", row_group_size=3)
    assert read("parquet", tmp_path) == texts
    with pytest.raises(UserError, match=r"no column data\.text_key=body; the file has: text, n"):
        read("parquet", tmp_path, text_key="body")
    with pytest.raises(UserError, match=r"data\.text_key=n is a number there, not text"):
        read("parquet", tmp_path, text_key="n")
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(UserError, match=r"b\.parquet: not a parquet file"):
        read("parquet", tmp_path / "b.parquet")


def test_hf_dataset_saved_locally(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="hf extra not installed")
    one = datasets.Dataset.from_dict({"text": ["a", "b"]})
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert read("hf", tmp_path / "one") == ["a", "b"]
    assert read("hf", tmp_path / "two", split="test") == ["b"]
    with pytest.raises(UserError, match="one unnamed split"):
        read("hf", tmp_path / "one", split="test")
    with pytest.raises(UserError, match="the folder has the splits train, test"):
        read("hf", tmp_path / "two", split="valid")
    with pytest.raises(UserError, match=r"no column data\.text_key=body; the dataset has: text"):
        read("hf", tmp_path / "one", text_key="body")


@pytest.mark.parametrize(
    ("module", "source", "extra"), [("pyarrow.parquet", "parquet", "parquet"), ("datasets", "hf", "hf")]
)
def test_missing_extra_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, extra: str
) -> None:
    (tmp_path / "a.parquet").write_text("x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install trainsys\[{extra}\]"):
        read(source, tmp_path)


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "shards", "megatron", "synthetic"])
def test_a_split_that_would_be_ignored_is_refused(make_config: Any, source: str) -> None:
    with pytest.raises(UserError, match=f"source {source} has no splits"):
        build_source(make_config(source=source, path=None if source == "synthetic" else "x", split="valid"))


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "shards"])
def test_missing_path(tmp_path: Path, make_config: Any, source: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        build_source(make_config(source=source, path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="in this folder"):
        build_source(make_config(source=source, path=str(tmp_path)))


def test_fingerprint_follows_change_of_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "two"}')

    def fingerprint(**more: Any) -> str:
        return open_documents(DataConfig(source="jsonl", path=str(path), **more)).fingerprint()

    first = fingerprint()
    assert fingerprint() == first != fingerprint(text_key="body")
    path.write_text('{"text": "onE", "body": "two"}')
    assert fingerprint() != first


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    documents = open_documents(DataConfig(source="text", path=str(tmp_path)))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: cannot read: No such file"):
        list(documents)


def test_every_document_goes_through_the_byte_tokenizer(tmp_path: Path, make_config: Any) -> None:
    (tmp_path / "a.txt").write_text("hello world, this is text")
    cfg = make_config(
        source="text", path=str(tmp_path), cache_dir=str(tmp_path / "cache"), shuffle=False, global_batch=1
    )
    batch = build_source(cfg).batch(0)
    assert ByteTokenizer().decode(batch.tokens[0].tolist()) == "hello world, thi"
