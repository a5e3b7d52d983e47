"""Operators of torch that nobody promises to keep, as the product calls them: on any build, of any version it runs on."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import trainsys

# As in 2.11.0 and 2.13.0. What a newer torch changes here, the product's calls must follow.
# Arguments that 2.13 added, which the product does not give.
NEWER = ", Tensor? block_table=None, int? num_splits=None" if torch.__version__ >= "2.12" else ""
SCHEMAS = {
    "_flash_attention_forward": "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None"
    f"{NEWER}) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    "_flash_attention_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)",
    "_fused_rms_norm": "(Tensor input, int[] normalized_shape, Tensor? weight, float? eps) -> (Tensor, Tensor)",
    "_grouped_mm": "(Tensor self, Tensor mat2, Tensor? offs=None, Tensor? bias=None, ScalarType? out_dtype=None)"
    " -> Tensor",
    "_local_scalar_dense": "(Tensor self) -> Scalar",
    "_scaled_dot_product_efficient_attention": "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, "
    "bool compute_log_sumexp, float dropout_p=0., bool is_causal=False, *, float? scale=None) -> "
    "(Tensor output, Tensor log_sumexp, Tensor philox_seed, Tensor philox_offset)",
    "_scaled_dot_product_efficient_attention_backward": "(Tensor grad_out_, Tensor query, Tensor key, Tensor value, "
    "Tensor attn_bias, Tensor out, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, float dropout_p, "
    "bool[4] grad_input_mask, bool is_causal=False, *, float? scale=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "_scaled_dot_product_flash_attention_for_cpu": "(Tensor query, Tensor key, Tensor value, float dropout_p=0., "
    "bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "(Tensor grad_out, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, Tensor? attn_mask=None, "
    "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    "native_layer_norm_backward": "(Tensor grad_out, Tensor input, SymInt[] normalized_shape, Tensor mean, "
    "Tensor rstd, Tensor? weight, Tensor? bias, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
}


def used() -> set[str]:
    """Operators that the product's source reaches under ``torch.ops.aten``, by an underscore or for a backward."""
    found = set()
    for path in Path(trainsys.__file__).parent.rglob("*.py"):
        found |= set(re.findall(r"\baten\.(_\w+|\w+_backward)\b", path.read_text(encoding="utf-8")))
    return found


def test_every_private_operator_of_the_product_has_a_schema_here() -> None:
    assert used() - set(SCHEMAS) == set()
    assert set(SCHEMAS) - used() == set(), "no longer called"


def test_schemas_are_those_that_the_product_was_written_for() -> None:
    here = {name: str(getattr(torch.ops.aten, name).default._schema) for name in SCHEMAS}
    assert here == {name: f"aten::{name}{schema}" for name, schema in SCHEMAS.items()}
