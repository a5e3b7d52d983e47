"""Makes DeepSpeed's engine of our model, and runs its steps. Imported once DeepSpeed is known to be there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import groups
from torch import Tensor, nn

from trainsys.capabilities.deepspeed import zero_stage
from trainsys.config.run import RunConfig
from trainsys.data.packing import Batch
from trainsys.engines.deepspeed import environment
from trainsys.engines.deepspeed.fragments import Fragment, fragments, masters_to_model
from trainsys.engines.deepspeed.model import build_model, materialise, tell_tensor_parallel
from trainsys.engines.deepspeed.optimizer import AskingAdamW, build_optimizer
from trainsys.engines.deepspeed.settings import mixed, settings
from trainsys.engines.deepspeed.topology import Topology
from trainsys.engines.loss import loss_sums
from trainsys.layout import Layout
from trainsys.models.decoder import Decoder
from trainsys.models.init import fill
from trainsys.models.shards import ShardSpec
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.pipeline.stage import Inputs
from trainsys.telemetry.recorder import Recorder

Ask = Callable[[Tensor], None]
"""Called with the rank's sum of nll, before the update"""


class Built:
    """DeepSpeed's engine with what this project needs to know of it."""

    def __init__(
        self, cfg: RunConfig, mesh: Mesh, recorder: Recorder, model: nn.Module, decoder: Decoder,
        shards: dict[str, ShardSpec], names: dict[nn.Parameter, str], ds_settings: dict[str, Any], mpu: Topology | None,
    ) -> None:  # fmt: skip
        self.cfg, self.mesh, self.phase, self.settings = cfg, mesh, recorder.phase, ds_settings
        self.decoder = decoder
        dims = {name: len(spec.full_shape) for name, spec in shards.items()}
        optimizer = build_optimizer(((name, p) for p, name in names.items()), cfg.optim, dims)
        # Of an engine before, in this process.
        groups.mpu = None
        self.ds, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_settings, mpu=mpu, dist_init_required=False
        )
        self.optimizer: AskingAdamW = optimizer
        self.fragments: list[Fragment] = fragments(self.ds, names, shards)
        self._norm: Tensor | None = None
        if not self.ds.zero_optimization_stage():
            self.ds.clip_fp32_gradients = self._clip
            if not cfg.optim.clip_norm:
                # It would not even measure the norm.
                optimizer.register_step_pre_hook(lambda *_: self._clip())
        for fragment in self.fragments:
            for place, data in fragment.pieces(fragment.owner):
                fill(data, place, fragment.name, cfg.model, cfg.train.seed)
        self.masters_to_model()

    def masters_to_model(self) -> None:
        masters_to_model(self.ds)

    def norm(self) -> Tensor:
        """The gradient norm before clipping; inf where it is not a number."""
        found = self.ds.optimizer._global_grad_norm if self._norm is None else self._norm
        norm = torch.as_tensor(found, dtype=torch.float32, device=self.mesh.device).reshape(())
        return torch.where(norm < 0, float("inf"), norm)  # its sign that there is none

    def _clip(self) -> None:
        """In place of the engine's method of stage 0, which forgets the norm."""
        limit = self.cfg.optim.clip_norm or float("inf")
        self._norm = clip_grad_norm_(self.ds.module.parameters(), limit, mpu=self.ds.mpu)

    def inputs(self, batch: Batch) -> Inputs:
        with self.phase("data"):
            return Inputs.of(batch, self.mesh.device)

    def run(self, batches: Sequence[Batch], tokens: int, ask: Ask) -> None:
        """Forward and backward of each micro-batch in turn, then the update."""
        nll_sum = torch.zeros((), device=self.mesh.device)
        for batch in batches:
            inputs = self.inputs(batch)
            with self.phase("forward"):
                logits = self.ds(inputs.tokens, inputs.positions, inputs.docs)
                loss, nll = self.loss(logits, inputs.labels)
                nll_sum += nll
                del logits
            with self.phase("backward"):
                self.ds.backward(loss * (self.grad_scale / tokens), scale_wrt_gas=False)
            if batch is not batches[-1]:
                self.ds.step()  # counts the micro-batch, no more
        with self.phase("optimizer"):
            ask(nll_sum)
            self.ds.step()

    @property
    def grad_scale(self) -> float:
        """By what DeepSpeed divides gradients when it reduces them."""
        return grad_scale(self.cfg, self.mesh.layout)

    def loss(self, out: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(what is differentiated, the sum of nll) of what the model gives."""
        return loss_sums(self.cfg, self.mesh, out, labels, self.decoder)


def grad_scale(cfg: RunConfig, layout: Layout) -> float:
    """Data ranks; with stage 3, whose reduce-scatter divides by all who take part, those of a sequence too."""
    return float(layout.data_world * (layout.cp if zero_stage(cfg, layout) == 3 else 1))


def build(cfg: RunConfig, mesh: Mesh, recorder: Recorder) -> Built:
    """Every rank must call it."""
    if mesh.device.type == "cpu":
        environment.prepare_cpu()
    # Of the group that is up. A pipeline and stage 3 communicate before they initialise.
    deepspeed.init_distributed(dist_init_required=False)
    given = settings(cfg, mesh.layout, mesh.device.type == "cuda")
    if mesh.layout.pp > 1:
        from trainsys.engines.deepspeed.pipeline import build_pipeline

        return build_pipeline(cfg, mesh, recorder, given)
    mpu = Topology(mesh)
    model, shards = build_model(cfg, mesh, grad_scale(cfg, mesh.layout))
    if mixed(cfg, mesh.layout):
        for p in model.parameters():  # and no buffers, which count and balance
            p.data = p.data.to(torch.bfloat16)
    zero3 = given if zero_stage(cfg, mesh.layout) == 3 else None
    materialise(model, mesh.device, zero3, mpu)
    tell_tensor_parallel(model, shards, mesh, cfg)
    names = {p: name for name, p in model.named_parameters()}
    return Built(cfg, mesh, recorder, model, model, shards, names, given, mpu)
