from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainsys.data.tokenizer import ByteTokenizer, load_tokenizer
from trainsys.errors import UserError


@given(st.text(st.characters(codec=None)))
@example("lone \ud800 surrogate")
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == 0 or ids.max() < 256
    assert tokenizer.decode(ids.tolist()) == text


def test_bytes_special_ids_lie_outside_bytes_and_vanish_in_text() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (256, 257, 258, 259)
    assert tokenizer.decode([256, 104, 105, 257, 258]) == "hi"
    assert tokenizer.decode([0xC3]) == "�"


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny byte-level BPE, trained here."""
    tokenizers = pytest.importorskip("tokenizers", reason="hf extra not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|stop|>", "<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the cat sat on the hat"] * 20, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_hf_round_trip_and_merges(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_folder / "tokenizer.json"))
    text = "the cat sat, naïve façade \U0001f600"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert len(tokenizer.encode("the cat sat on the mat")) < 12, "no merges: these are bytes"
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.encode_batch([text, "the"])[0].tolist() == ids.tolist()
    assert tokenizer.eos == 1


def test_hf_folder_and_tokenizer_config_name_the_end_token(bpe_folder: Path, tmp_path: Path) -> None:
    raw = (bpe_folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(raw)
    config = {"eos_token": {"content": "<|stop|>"}, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eos, tokenizer.pad) == (0, 1)
    assert tokenizer.fingerprint == load_tokenizer(str(bpe_folder)).fingerprint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(UserError, match="no end-of-text token among <nope>"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(str(tmp_path))


def test_hf_added_tokens_count_and_may_end_the_text(bpe_folder: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="hf extra not installed")
    raw = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    before = raw.get_vocab_size()
    raw.add_special_tokens(["<extra>", "<last>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<last>"}))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.eos, tokenizer.vocab_size) == (before + 1, before + 2)


def test_hf_lone_surrogate_does_not_stop_the_run(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_folder))
    assert tokenizer.decode(tokenizer.encode("a\ud800b").tolist()) == "a?b"


def test_missing_or_broken_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; give 'bytes'"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    pytest.importorskip("tokenizers", reason="hf extra not installed")
    with pytest.raises(UserError, match=f"{broken}: not a readable tokenizer.json"):
        load_tokenizer(str(broken))


def test_missing_extra_names_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"pip install trainsys\[hf\]"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"pip install trainsys\[hf\]"):
        load_tokenizer("gpt2")


def test_hub_name_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="hf extra not installed")

    def offline(*_: str) -> str:
        raise OSError("no network here\nsecond line")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(UserError) as caught:
        load_tokenizer("nobody/nothing")
    assert "no network here" in str(caught.value)
    assert "\n" not in str(caught.value)
