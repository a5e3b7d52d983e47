"""The configs that come with trainsys: every one loads, and the models are the published ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainsys.config.loader import load_run, read_tree
from trainsys.config.model import ModelConfig, RopeConfig
from trainsys.config.root import config_root
from trainsys.layout import Layout

MODELS = sorted((config_root() / "models").glob("[a-z]*.yaml"))
TRAIN = sorted((config_root() / "train").glob("*.yaml"))

# As published on the model cards of meta-llama and Qwen (safetensors totals).
PUBLISHED = {
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
}  # fmt: skip
SIZES = {"m": 10**6, "b": 10**9}


def shapes(model: ModelConfig) -> Iterator[tuple[int, ...]]:
    """Every parameter's shape, matrix by matrix, independent of the package's own formulas."""
    d, heads, kv, dh = model.d_model, model.n_heads, model.kv_heads, model.dim_per_head
    yield model.vocab, d
    for _ in range(model.n_layers):
        yield from ((heads * dh, d), (kv * dh, d), (kv * dh, d), (d, heads * dh))
        yield from [(dh,), (dh,)] * model.qk_norm
        yield from [(model.d_ff, d)] * (3 if model.ffn_kind == "swiglu" else 2)
        yield from ((d,), (d,))
    yield (d,)
    if not model.tied_embeddings:
        yield model.vocab, d


def parameters(model: ModelConfig) -> int:
    total = 0
    for shape in shapes(model):
        total += shape[0] * (shape[1] if len(shape) == 2 else 1)
    return total


def model_of(name: str) -> ModelConfig:
    return load_run(f"models/{name}").model


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name: str) -> None:
    assert parameters(model_of(name)) == PUBLISHED[name]
    text = (config_root() / "models" / f"{name}.yaml").read_text()
    assert f"Parameters: {PUBLISHED[name]:,}." in text


@pytest.mark.parametrize("file", [f for f in MODELS if f.stem.startswith("gpt3-")], ids=lambda f: f.stem)
def test_gpt3_sizes_are_near_their_names(file: Path) -> None:
    number, unit = re.fullmatch(r"gpt3-([\d.]+)([mb])", file.stem).groups()  # type: ignore[union-attr]
    model = model_of(file.stem)
    assert parameters(model) == pytest.approx(float(number) * SIZES[unit], rel=0.025)
    assert (model.ffn_kind, model.d_ff) == ("gelu", 4 * model.d_model)


def test_every_family_is_there() -> None:
    gpt3 = {f"gpt3-{size}" for size in ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b")}
    assert {f.stem for f in MODELS} >= set(PUBLISHED) | gpt3 | {"tiny", "tiny-gqa", "tiny-qwen"}


@pytest.mark.parametrize("file", MODELS, ids=lambda f: f.stem)
def test_a_model_file_names_itself_and_runs_alone(file: Path) -> None:
    assert load_run(file).model.name == file.stem


@pytest.mark.parametrize("below", ["llama3-405b", "qwen3-4b", "gpt3-125m"])
def test_a_model_included_over_another_inherits_nothing(below: str, tmp_path: Path) -> None:
    for file in MODELS:
        both = tmp_path / "both.yaml"
        both.write_text(f"include: [models/{below}, models/{file.stem}]\n")
        assert load_run(both).model == model_of(file.stem)


def test_the_defaults_name_every_optional_field() -> None:
    """What keeps the test above true when ModelConfig grows a field."""
    said = read_tree("models/_defaults").values["model"]
    optional = {name for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    assert set(said) == optional - {"name", "max_seq_len"}
    assert set(said["rope"]) == set(RopeConfig.model_fields)
    required = {name for name, field in ModelConfig.model_fields.items() if field.is_required()}
    for file in MODELS:
        assert required | {"name", "max_seq_len"} <= set(read_tree(file).values["model"]), file.stem


def test_llama31_stretches_rope_as_published() -> None:
    rope = model_of("llama3-405b").rope
    assert (rope.theta, rope.scaling, rope.factor) == (500_000, "llama3", 8)
    assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_seq_len) == (1, 4, 8192)
    assert model_of("llama3.2-1b").rope.factor == 32
    assert model_of("llama3-8b").rope.scaling == "none"


@pytest.mark.parametrize("file", TRAIN, ids=lambda f: f.stem)
def test_a_train_config_fits_a_layout(file: Path) -> None:
    run = load_run(file)
    sizes = [run.parallel.pp, run.parallel.dp_replicate, run.parallel.dp_shard, run.parallel.cp, run.parallel.tp]
    fixed = math.prod(size for size in sizes if size != -1)  # an axis of -1 takes what is left of a multiple of it
    world = fixed if -1 not in sizes else fixed * math.ceil(64 / fixed)
    _, warnings = Layout.of(run, world)
    assert warnings == []


def test_the_demo_is_the_demo() -> None:
    run = load_run("train/demo")
    assert Layout.resolve(run.parallel, 4).describe(run.parallel) == "dp_shard=2 × tp=2 (+sp)"
    assert (run.data.source, run.data.tokenizer, run.train.dtype) == ("stdlib", "bytes", "fp32")
    assert 258 < run.model.vocab <= 512
    assert 10**5 < parameters(run.model) < 10**7
