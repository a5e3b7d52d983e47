"""Text to token ids: bytes with no vocabulary file, or a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainsys.errors import UserError

# Names that published tokenizers give their end-of-text token, used where no tokenizer_config.json says it.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>")


class Tokenizer(Protocol):
    """``encode`` adds no special token; the corpus writer appends ``eos`` after each document."""

    name: str
    fingerprint: str
    vocab_size: int
    eos: int
    pad: int

    def encode(self, text: str) -> NDArray[np.uint32]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """Ids 0-255 are UTF-8 bytes, then BOS, EOS, PAD. Models use a padded vocabulary such as 320."""

    name = "bytes"
    fingerprint = "bytes-v1"
    bos, eos, pad = 256, 257, 258
    vocab_size = 259

    def encode(self, text: str) -> NDArray[np.uint32]:
        # surrogatepass: a lone surrogate (legal in JSON text) round-trips instead of stopping the run.
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Special ids are dropped; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        data = bytes(i for i in (int(i) for i in ids) if i < 256)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")


class HFTokenizer:
    """A ``tokenizer.json`` read by the ``tokenizers`` library (hf extra)."""

    def __init__(self, path: Path, name: str, config: Path | None = None) -> None:
        tokenizers = _import_hf("tokenizers")
        try:
            raw = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer.json: {error}") from error
        self.name = name
        self.fingerprint = "hf-" + hashlib.sha256(raw).hexdigest()[:24]
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the largest id counts, not the number of entries.
        self.vocab_size = max(vocab.values(), default=-1) + 1
        special = _special_tokens(config)
        candidates = [special["eos_token"]] if "eos_token" in special else list(_EOS_NAMES)
        found = [vocab[token] for token in candidates if token in vocab]
        if not found:
            raise UserError(
                f"{path}: no end-of-text token among {', '.join(candidates)}; "
                "put a tokenizer_config.json with eos_token beside it"
            )
        self.eos = found[0]
        self.pad = vocab.get(special.get("pad_token", ""), self.eos)

    def encode(self, text: str) -> NDArray[np.uint32]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        # A lone surrogate (legal in JSON text) has no UTF-8 form and would stop the library: it becomes "?".
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        encoded = self._tokenizer.encode_batch(clean, add_special_tokens=False)
        return [np.array(e.ids, np.uint32) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text


def load_tokenizer(spec: str) -> Tokenizer:
    """``"bytes"``, a ``tokenizer.json``, a folder that holds one, or a name on the Hugging Face hub.

    Raises ``UserError`` when the file or name cannot be read, has no end-of-text token, or the extra is
    missing.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return HFTokenizer(path, spec, path.parent / "tokenizer_config.json")
    if path.suffix == ".json" or path.is_absolute() or spec.startswith((".", "~")):
        raise UserError(f"data.tokenizer={spec}: no such file; give 'bytes', a tokenizer.json or a hub name")
    _import_hf("tokenizers")
    hub = _import_hf("huggingface_hub")
    try:
        found = Path(hub.hf_hub_download(spec, "tokenizer.json"))
    except Exception as error:  # offline, unknown name, no permission: one line either way
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"data.tokenizer={spec}: not a local path and not fetched from the hub ({reason}); "
            "give 'bytes', or the path of a tokenizer.json"
        ) from error
    try:
        config: Path | None = Path(hub.hf_hub_download(spec, "tokenizer_config.json"))
    except Exception:
        config = None  # optional on the hub: the usual end-of-text names are tried then
    return HFTokenizer(found, spec, config)


def _special_tokens(config: Path | None) -> dict[str, str]:
    """Names of the special tokens in a tokenizer_config.json; a token is a string or {"content": string}."""
    if config is None or not config.is_file():
        return {}
    try:
        record = json.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{config}: not valid JSON: {error}") from error
    names = {}
    for key in ("eos_token", "pad_token"):
        value = record.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names


def _import_hf(module: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise UserError(
            f"this tokenizer needs '{module}': pip install trainsys[hf], or use 'bytes'"
        ) from error
