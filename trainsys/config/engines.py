"""Settings of one engine each; they mean nothing to the others."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainsys.config.base import Strict

EngineName = Literal["native", "deepspeed", "megatron"]


class DeepSpeedConfig(Strict):
    """See docs/engines-deepspeed.md."""

    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        default=None,
        description="what is sharded over dp_shard: 1 optimizer states, 2 gradients too, 3 parameters too; "
        "None: by the layout: 3 (2 where fsdp.reshard_after_forward is off), in a pipeline 1, for dp_replicate 0",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="what is kept in host memory; all needs zero_stage 3"
    )


class MegatronConfig(Strict):
    """See docs/engines.md."""

    distributed_optimizer: bool = Field(
        default=True, description="shard optimizer states over dp_shard (its counterpart of ZeRO-1)"
    )
    kernels: Literal["auto", "plain"] = Field(
        default="auto", description="on a GPU: auto: what of Transformer Engine and apex is installed; plain: neither"
    )
