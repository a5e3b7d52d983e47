"""FLOPs of one rank in one step, to the last one."""

from __future__ import annotations

from trainsys.flops import head_gemm, layer_gemms, layer_is_recomputed, row_pairs
from trainsys.planner.exact.place import Place


def attention_pairs(place: Place) -> int | None:
    """(query, key) pairs times heads that this rank computes in one layer for one micro-batch.

    None where it depends on the rank or on a mask: windows, and in rings contiguous cuts and documents. A zigzag gives
    each of n ranks chunks r and 2n-1-r of L tokens: (2n-1)L² + L(L+1) pairs, whether queries or keys move. Ulysses
    computes whole rows on 1/n of the heads: as many.
    """
    cfg, layout = place.cfg, place.layout
    seq, window = cfg.train.seq_len, cfg.model.sliding_window
    document = cfg.data.document_length
    if window is not None and window < seq:
        return None
    uneven = place.context.balance == "contiguous" or (document or seq) < seq
    if uneven and layout.cp > 1 and place.context.ring > 1:
        return None
    pairs = cfg.train.micro_batch * cfg.model.n_heads // layout.tp * row_pairs(seq, document=document)
    assert pairs % layout.cp == 0
    return pairs // layout.cp


def step_flops(place: Place) -> int | None:
    """Multiplications of a step, 2 a multiply-add: products, attention, and what is computed again.

    None where attention's are not known (see `attention_pairs`). Experts are taken to be evenly loaded.
    """
    cfg, model, tp = place.cfg, place.cfg.model, place.layout.tp
    pairs = attention_pairs(place)
    if pairs is None:
        return None
    attention = 4 * model.dim_per_head * pairs
    policy = cfg.recompute.policy
    total = 0
    for part in place.parts.values():
        for layer in part.layers:
            gemms = [
                place.tokens * g.flops_per_token // (1 if g.component == "router" else tp)
                for g in layer_gemms(model, layer)
            ]
            forward = sum(gemms) + attention
            total += 3 * forward
            whole = layer_is_recomputed(cfg.recompute, layer)
            if whole or policy == "selective++":
                total += sum(gemms) + (attention if whole else 0)
                # Nothing needs the last product's result a second time; experts' outputs their gates do.
                total -= gemms[-1] if layer_gemms(model, layer)[-1].component == "ffn" else 0
            elif policy == "selective":
                total += attention
        if part.head:
            total += 3 * place.tokens * head_gemm(model).flops_per_token // tp
    return total * place.micros
