"""Engines: what runs a step. All train the same model on the same batches under the same layout."""

from __future__ import annotations

from trainsys.config.run import RunConfig
from trainsys.engines.base import Engine
from trainsys.errors import UserError
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder


def build(cfg: RunConfig, mesh: Mesh, recorder: Recorder) -> Engine:
    """The engine that ``cfg.engine`` names. UserError where its package is not installed."""
    if cfg.engine == "native":
        from trainsys.engines.native import NativeEngine

        return NativeEngine(cfg, mesh, recorder)
    try:
        if cfg.engine == "deepspeed":
            from trainsys.engines.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(cfg, mesh, recorder)
        from trainsys.engines.megatron import MegatronEngine

        return MegatronEngine(cfg, mesh, recorder)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == cfg.engine:
            raise UserError(
                f"engine={cfg.engine}: the package is not installed; pip install 'trainsys[{cfg.engine}]', "
                "or engine=native"
            ) from None
        raise
