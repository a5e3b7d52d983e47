"""Megatron-Core's model, parallelism, schedules and optimizer under our configuration, data and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from trainsys.capabilities import refuse_unable
from trainsys.comm import ops
from trainsys.config.run import RunConfig
from trainsys.data.loader import StepData
from trainsys.data.packing import Batch
from trainsys.engines.base import Judge, LocalTensor, StepResult
from trainsys.engines.megatron import build, on_cpu
from trainsys.engines.megatron.kernels import Kernels, kernels_for
from trainsys.engines.megatron.masters import Master, masters, publish
from trainsys.engines.megatron.names import Part, Rows, rows_of
from trainsys.engines.megatron.pieces import boxes
from trainsys.engines.megatron.theory import estimated_throughput, theoretical_memory
from trainsys.engines.megatron.timers import PhaseTimers
from trainsys.engines.noise import hush
from trainsys.engines.observed import observe
from trainsys.flops import StepWork, step_flops
from trainsys.models.init import fill
from trainsys.models.shards import ShardSpec
from trainsys.ops.loss import IGNORE, cross_entropy_sum
from trainsys.optim.norm import clip_
from trainsys.optim.schedule import learning_rate
from trainsys.parallel.context.core import SequenceCut
from trainsys.parallel.mesh import Mesh
from trainsys.parallel.pipeline.stage import Inputs
from trainsys.telemetry.recorder import Recorder


class MegatronEngine:
    """Trains ``cfg.model`` under the layout of ``mesh``; see :class:`trainsys.engines.base.Engine`.

    Megatron-Core keeps its process groups in globals: one of these a process at a time.
    """

    def __init__(self, cfg: RunConfig, mesh: Mesh, recorder: Recorder) -> None:
        self.cfg, self.mesh, self.recorder, self.device = cfg, mesh, recorder, mesh.device
        hush()
        if self.device.type == "cpu":
            on_cpu.install()
            # The table was asked before anybody knew what train.device=auto is.
            here = cfg.model_copy(update={"train": cfg.train.model_copy(update={"device": "cpu"})})
            refuse_unable(here, mesh.layout)
        observe(mesh, build.axes_of(mesh.layout))
        build.join(cfg, mesh.layout, self.device)
        kernels = kernels_for(cfg, self.device)
        self._say(kernels)
        config = build.transformer_config(cfg, mesh.layout, self.device, kernels)
        with on_cpu.cuda_by_name(self.device):
            self._chunks = build.model_chunks(cfg, config, mesh, kernels)
            self.optimizer = build.optimizer_for(cfg, self._chunks)
        self._config = config
        self._timers = config.timers = PhaseTimers(recorder)
        config.finalize_model_grads_func = _finalize
        if self._chunks.wrapped[0].ddp_config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self._chunks.wrapped]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._schedule = get_forward_backward_func()
        self._cut = SequenceCut(cfg.parallel.context, mesh["cp"], cfg.train.seq_len)
        rows = self._rows()
        self._masters = [(m, rows[m.parameter]) for m in masters(self.optimizer)]
        self._updates = 0
        self._tokens_global = 0
        for weight in self.parameters():
            fill(weight.data, weight.place, weight.name, cfg.model, cfg.train.seed)
        publish(self.optimizer, self._chunks.wrapped)
        memory = theoretical_memory(cfg, mesh.layout)
        recorder.metrics(
            -1,
            {
                "megatron/memory_states_bytes": memory.states,
                "megatron/memory_activations_bytes": memory.activations,
            },
        )

    def _say(self, kernels: Kernels) -> None:
        """One line at the start; on CPU there is no choice to tell of."""
        if self.mesh.rank == 0 and self.device.type != "cpu":
            self.recorder.message("info", str(kernels))
            if self.cfg.telemetry.console != "off":
                print(kernels)

    def _rows(self) -> dict[nn.Parameter, Sequence[Rows]]:
        """Where the rows of every parameter held here lie in ours."""
        layout, moe = self.mesh.layout, self.cfg.model.moe
        first_expert = 0 if moe is None else self.mesh["ep"].index * moe.n_experts // layout.ep
        part = Part(layout.tp, self.mesh["tp"].index, first_expert)
        found: dict[nn.Parameter, Sequence[Rows]] = {}
        for chunk in self._chunks.plain:
            layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
            for name, parameter in chunk.named_parameters():
                found[parameter] = rows_of(name, layers.__getitem__, self.cfg.model, part)
        return found

    def train_step(
        self, step: int, data: StepData, judge: Judge | None = None, ask: float = 0.0
    ) -> StepResult:
        phase = self.recorder.phase
        self._tokens_global = data.valid_tokens_global
        for chunk in self._chunks.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        biases = [(b, b.clone()) for _, b in self._expert_biases()]
        inputs = [self._inputs(batch) for batch in data.micro_batches]
        iterators = [iter(inputs) for _ in self._chunks.wrapped]
        reported = self._schedule(
            forward_step_func=self._forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks.wrapped if len(iterators) > 1 else self._chunks.wrapped[0],
            num_microbatches=len(inputs),
            seq_length=self.cfg.train.seq_len,
            micro_batch_size=self.cfg.train.micro_batch,
            forward_only=False,
        )
        nll = torch.stack(reported).sum() if reported else torch.zeros((), device=self.device)
        with phase("optimizer"):
            lr = learning_rate(self.cfg.optim, step, self.cfg.train.steps)
            totals = self._clip(nll / data.valid_tokens_global, ask)
            applied = True
            if judge is not None:
                totals = totals.cpu()
                applied = judge(float(totals[0]), float(totals[1]))
            if applied:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.optimizer.step_with_ready_grads()
                self._updates += 1
            else:
                for bias, before in biases:  # moved with the gradients, before anybody was asked
                    bias.copy_(before)
        self._estimate(step, data)
        return StepResult(totals[:2], lr, totals[2], applied)

    def _estimate(self, step: int, data: StepData) -> None:
        """The straggler detector's number of this rank. On a GPU the host's clock says nothing of forward."""
        forward_s = self._timers.take_forward()
        if self.device.type == "cpu":
            work = StepWork(data.real_tokens_global, data.attn_pairs_global, self.cfg.train.seq_len)
            flops = step_flops(self.cfg.model, work, self.cfg.recompute).model
            estimate = estimated_throughput(flops, forward_s, self.mesh.layout.world)
            self.recorder.metrics(step, {"megatron/estimated_flops_per_s": estimate})

    def _inputs(self, batch: Batch) -> Inputs:
        """This rank's part of a micro-batch, on the device."""
        with self.recorder.phase("data"):
            return Inputs.of(self._cut(batch), self.device)

    def _forward(self, data: Iterator[Inputs], model: Any) -> tuple[Tensor, Any]:
        """One micro-batch through one stage: what it gives, and what makes a loss of that."""
        inputs, chunk = next(data), model.module
        chunk.rotary_pos_emb.set(inputs.positions, same_rows=inputs.docs is None)
        mask = None if inputs.docs is None else torch.from_numpy(inputs.docs.starts())
        ours = self.cfg.optim.z_loss > 0
        labels = None if ours or not chunk.post_process else inputs.labels.clamp(min=0)
        out = model(inputs.tokens, inputs.positions, mask, labels=labels)
        return out, partial(self._z_loss if ours else self._loss, inputs.labels)

    def _loss(self, labels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From Megatron's cross-entropy of every token: (what is differentiated, unused count, sum of nll)."""
        nll = (losses * (labels != IGNORE)).sum()
        return nll / self._tokens_global, torch.zeros((), dtype=torch.int, device=nll.device), nll.detach()

    def _z_loss(self, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from its logits, for it has no z-loss of the head."""
        loss, nll = cross_entropy_sum(logits, labels, z_loss=self.cfg.optim.z_loss, group=self.mesh["tp"])
        return loss / self._tokens_global, torch.zeros((), dtype=torch.int, device=nll.device), nll

    def _clip(self, nll: Tensor, ask: float) -> Tensor:
        """Megatron's norm, clipped by it; [loss, norm, what ranks ask], over all ranks."""
        self.optimizer.prepare_grads()
        norm = torch.as_tensor(self.optimizer.get_grad_norm(), dtype=torch.float32, device=self.device)
        mine = torch.stack([nll / self.mesh.layout.tp, torch.full_like(nll, ask)])
        loss, asked = ops.all_reduce_(mine, self.mesh["world"])
        if self.cfg.optim.clip_norm:
            clip_([m.gradient for m, _ in self._masters], norm, self.cfg.optim.clip_norm)
        return torch.stack([loss, norm, asked])

    def parameters(self) -> Iterator[LocalTensor]:
        for master, rows in self._masters:
            yield from _boxes(master, master.data, rows)

    def gradients(self) -> Iterator[LocalTensor]:
        for master, rows in self._masters:
            yield from _boxes(master, master.gradient, rows)

    def state(self) -> Iterator[LocalTensor]:
        for master, rows in self._masters:
            yield from _boxes(master, master.data, rows)
            for moment, data in master.moments(self._updates).items():
                for box in _boxes(master, data, rows):
                    yield LocalTensor(f"{box.name}@{moment}", box.data, box.place)
        for name, bias in self._expert_biases():
            yield LocalTensor(name, bias, ShardSpec.whole(bias.shape))

    def _expert_biases(self) -> Iterator[tuple[str, Tensor]]:
        for chunk in self._chunks.plain:
            for layer in chunk.decoder.layers:
                bias = getattr(getattr(layer.mlp, "router", None), "expert_bias", None)
                if bias is not None:
                    yield f"layers.{layer.layer_number - 1}.ffn.router.expert_bias", bias

    @property
    def updates(self) -> int:
        return self._updates

    def resumed(self, updates: int) -> None:
        self._updates = updates
        for master, _ in self._masters:
            master.resume(updates)
        publish(self.optimizer, self._chunks.wrapped)


def _boxes(master: Master, data: Tensor, rows: Sequence[Rows]) -> Iterator[LocalTensor]:
    shape = master.parameter.shape
    return boxes(data, master.start, rows, 1 if len(shape) == 1 else shape[1])


def _finalize(model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
    """All of Megatron's reductions, but no division: the loss has been divided already."""
    finalize_model_grads(model, None, **options)
