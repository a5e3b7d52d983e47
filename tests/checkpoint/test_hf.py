"""Hugging Face folders in and out: what `transformers` computes from them is what we compute, and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainsys.checkpoint.atoms import AtomReader
from trainsys.checkpoint.convert import convert, diff
from trainsys.checkpoint.deepspeed_universal import export as universal
from trainsys.checkpoint.deepspeed_universal import import_ as import_universal
from trainsys.checkpoint.hf import INDEX, export, import_, open_folder, our_name, their_name
from trainsys.checkpoint.hf_config import ARCHITECTURES, from_hf_config, to_hf_config
from trainsys.checkpoint.inspect import open_checkpoint
from trainsys.config.model import ModelConfig
from trainsys.errors import UserError
from trainsys.models.decoder import Decoder

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")

TINY = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, epsilon": ("Llama", {"rms_norm_eps": 0.02}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama3, no original length": (
        "Llama",
        {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}},
    ),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn, no original length": (
        "Qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "yarn, attention_factor": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}),
    "yarn, mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "yarn, two mscales": ("Llama", {"rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}),
    "yarn, one mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 2.0}}),
    "yarn, betas": ("Llama", {"rope_parameters": {**YARN, "beta_fast": 2.0, "beta_slow": 0.25}}),
    "yarn, not truncated": (
        "Llama",
        {"rope_parameters": {**YARN, "beta_fast": 2.0, "beta_slow": 0.25, "truncate": False}},
    ),
    "llama3, tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize(("family", "options"), FAMILIES.values(), ids=FAMILIES)
def test_import_gives_their_logits_and_export_gives_them_back(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY, **options, attn_implementation="eager")
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:  # norms start at 1 and biases at 0
                p.add_(torch.randn(p.shape) * 0.2)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    checkpoint = import_(tmp_path / "hf", tmp_path / "run")

    manifest = open_checkpoint(checkpoint)
    cfg = ModelConfig.model_validate(manifest.config["model"])
    model, reader = Decoder(cfg), AtomReader(checkpoint, manifest)
    tokens = torch.randint(64, (2, 40))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(reader.read(name))
        logits, want = model(tokens, torch.arange(40).expand(2, 40)), theirs(tokens).logits
    assert want.std() > 0.1
    assert ((logits - want).abs() / want.std()).max() < 1e-5

    export(checkpoint, tmp_path / "out", "F32", shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(again) is type(theirs)
    for name, p in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name
    with torch.no_grad():
        assert ((again(tokens).logits - want).abs() / want.std()).max() < 1e-5
    assert diff(import_(tmp_path / "out", tmp_path / "run2"), checkpoint) == []
    export(checkpoint, tmp_path / "half")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    name, p = next(iter(theirs.state_dict().items()))
    assert torch.equal(half.state_dict()[name].float(), p.bfloat16().float())


def test_names_are_translated_both_ways() -> None:
    cfg = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab=8, qk_norm=True)
    with torch.device("meta"):
        names = [name for name, _ in Decoder(cfg).named_parameters()]
    assert [our_name(their_name(name)) for name in names] == names
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.scale: no counterpart"):
        our_name("model.layers.0.scale")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"is_causal": False}, "is_causal=False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 is not understood"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale=1.0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "long_factor": [1.0]}}, "long_factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "of the wrong kind"),
        ({"num_attention_heads": 5}, "n_heads=5 is not divisible"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_express_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        from_hf_config({"model_type": "llama", **TINY, **change})
    assert len(str(error.value).splitlines()) == 1


def test_what_is_switched_off_or_of_no_matter_to_the_computation_is_taken() -> None:
    more = {"embedding_multiplier": None, "some_feature": False, "temperature": 0.6, "rope_scaling": None}
    qwen = {**TINY, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}
    assert from_hf_config({"model_type": "llama", **TINY, **more}) == from_hf_config(
        {"model_type": "llama", **TINY}
    )
    assert from_hf_config(qwen).sliding_window is None


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_a_file_leaves_out_is_what_transformers_takes(family: str) -> None:
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    least = {**{name: TINY[name] for name in needed}, "hidden_size": 512, "num_attention_heads": 32}
    theirs = transformers.AutoConfig.for_model(family, **least)
    ours, whole = (from_hf_config({"model_type": family, **c}) for c in (least, theirs.to_dict()))
    assert ours.model_copy(update={"name": whole.name}) == whole
    assert ours.max_seq_len == theirs.max_position_embeddings


def save(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    model.save_pretrained(folder, **options)
    return model


def test_the_index_says_which_files_are_the_models(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    model = save(hf, max_shard_size="20KB")
    save_file = pytest.importorskip("safetensors.torch").save_file
    stale = {name: torch.zeros_like(p) for name, p in model.state_dict().items()}
    save_file(stale, hf / "model.safetensors")
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, hf / "consolidated.safetensors")
    said: list[str] = []
    checkpoint = import_(hf, tmp_path / "run", say=said.append)
    assert said == ["not read: consolidated.safetensors, model.safetensors"]
    reader = AtomReader(checkpoint, open_checkpoint(checkpoint))
    for name, p in model.state_dict().items():
        assert torch.equal(reader.read(our_name(name)), p), name

    (hf / INDEX).unlink()
    with pytest.raises(UserError, match=f"no {INDEX} that says which"):
        open_folder(hf)
    (hf / "model.safetensors").unlink()
    assert open_folder(hf)[1] == ["consolidated.safetensors"]
    next(hf.glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match="not one whole set"):
        open_folder(hf)


def test_a_plain_file_beside_a_consolidated_one_is_taken(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"Meta's own")
    assert open_folder(tmp_path)[1] == ["consolidated.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not a safetensors file"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intermediate_size": 40}, r"down_proj.weight is \[32, 48\], config.json says \[32, 40\]"),
        ({"num_key_value_heads": 4}, r"k_proj.weight is \[16, 32\], config.json says \[32, 32\]"),
        ({"vocab_size": 65}, r"(lm_head|embed_tokens).weight is \[64, 32\], config.json says \[65, 32\]"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "has model.layers.1"),
    ],
)
def test_weights_of_another_shape_than_the_config_says_are_refused(
    tmp_path: Path, change: dict[str, int], said: str
) -> None:
    save(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=said):
        import_(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-.*No such file"):
        open_folder(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="is no file of this folder"):
        open_folder(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(UserError, match="not an index"):
        open_folder(tmp_path)


def test_configs_come_back(tmp_path: Path) -> None:
    cfg = ModelConfig(
        name="llama",
        n_layers=2,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        d_ff=48,
        vocab=64,
        norm_eps=1e-6,
    )
    assert from_hf_config(json.loads(json.dumps(to_hf_config(cfg)))) == cfg
    gelu = cfg.model_copy(update={"ffn_kind": "gelu"})
    with pytest.raises(UserError, match="ffn_kind=gelu"):
        to_hf_config(gelu)


def test_nothing_is_written_into_a_folder_that_is_used(tmp_path: Path) -> None:
    """An import would take the place of a run's newest checkpoint; a file of that name gives no traceback either."""
    save(tmp_path / "hf")
    checkpoint = import_(tmp_path / "hf", tmp_path / "run")
    universal(checkpoint, tmp_path / "universal")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "lineage").write_text("a run that saved nothing yet")
    before = {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))}
    writers: list[tuple[Any, Path]] = [
        (import_, tmp_path / "hf"), (import_universal, tmp_path / "universal"), (export, checkpoint),
        (convert, checkpoint), (universal, checkpoint),
        (lambda source, target: convert(source, target, to="dcp"), checkpoint),
    ]  # fmt: skip
    for write, source in writers:
        for target in ("run", "file"):
            with pytest.raises(UserError, match=r"name a new") as error:
                write(source, tmp_path / target)
            assert len(str(error.value).splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))} == before
    import_(tmp_path / "hf", tmp_path / "begun")
