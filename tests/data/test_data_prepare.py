from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainsys.data.prepare import prepare, verify
from trainsys.data.shards import list_shards, open_shards
from trainsys.errors import UserError


def write_jsonl(path: Path, n: int = 10) -> Path:
    path.write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(n)))
    return path


def test_writes_shards_and_says_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = prepare(
        str(write_jsonl(tmp_path / "a.jsonl")),
        str(tmp_path / "deep" / "out"),
        text_key="body",
        shard_tokens=30,
    )
    assert (summary.documents, summary.tokens, summary.shards) == (10, 70, 2)
    shards = open_shards(list_shards(tmp_path / "deep" / "out"))
    assert [len(s.tokens) for s in shards] == [35, 35]
    assert summary.bytes == sum(s.path.stat().st_size for s in shards)
    assert shards[0].tokens[:7].tolist() == [*b"text 0", 257]
    printed = capsys.readouterr().out
    assert "10 documents, 70 tokens" in printed
    assert summary.fingerprint[:16] in printed
    assert verify(str(tmp_path / "deep" / "out")) == summary
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_same_text_same_fingerprint(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl"))
    prints = {prepare(source, str(tmp_path / out), text_key="body").fingerprint for out in "xy"}
    assert len(prints) == 1


def test_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(UserError, match=r"a\.jsonl:11: not valid JSON"):
        prepare(str(path), str(tmp_path / "out"), text_key="body")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_refusals(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(UserError, match="already exists and is not an empty folder"):
        prepare(source, str(tmp_path / "full"), text_key="body")
    with pytest.raises(UserError, match="already exists"):
        prepare(source, source, text_key="body")
    with pytest.raises(UserError, match="cannot tell the source from the name"):
        prepare(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(UserError, match="shard_tokens=0"):
        prepare(source, str(tmp_path / "out"), shard_tokens=0)
    with pytest.raises(UserError, match="stdlib takes no input"):
        prepare(source, str(tmp_path / "out"), source="stdlib")
    with pytest.raises(UserError, match="stdlib takes no input"):
        prepare(None, str(tmp_path / "out"), source="text")
    with pytest.raises(UserError, match="cannot write shards: Not a directory"):
        prepare(source, str(Path(source) / "out"), text_key="body")
    (tmp_path / "empty").mkdir()
    assert prepare(source, str(tmp_path / "empty"), text_key="body").documents == 10


def test_verify_names_the_damage(tmp_path: Path) -> None:
    prepare(str(write_jsonl(tmp_path / "a.jsonl")), str(tmp_path / "out"), text_key="body")
    (path,) = list_shards(tmp_path / "out")
    raw = bytearray(path.read_bytes())
    raw[70] ^= 1
    path.write_bytes(raw)
    for where in (tmp_path / "out", path):
        with pytest.raises(UserError, match="corrupt: token block 0"):
            verify(str(where))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*\.tok in this folder"):
        verify(str(tmp_path / "empty"))
