"""From a config to the sinks it asks for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from trainsys.config.run import TelemetryConfig
from trainsys.errors import UserError
from trainsys.telemetry.sinks.base import Sink, Sinks
from trainsys.telemetry.sinks.jsonl import JsonlSink


def refuse_missing(config: TelemetryConfig) -> None:
    """Raises ``UserError`` where ``config`` asks for a sink whose extra is not installed."""
    wanted = (
        (config.wandb.mode != "off", f"telemetry.wandb.mode={config.wandb.mode}", "wandb"),
        (config.tensorboard, "telemetry.tensorboard=true", "tensorboard"),
    )
    for asked, setting, extra in wanted:
        if asked and find_spec(extra) is None:
            raise UserError(f"{setting} needs {extra}: pip install 'trainsys[{extra}]'")


def build_sinks(
    config: TelemetryConfig, warn: Callable[[str], None], say: Callable[[str], None] | None = None
) -> Sinks:
    """The sinks of ``config``, for rank 0; each is imported only if wanted.

    ``warn`` and ``say`` take one line of text (a sink switched off; where an offline run is), from sink
    threads.
    """
    sinks: list[Sink] = [JsonlSink()]
    if config.console != "off":
        from trainsys.telemetry.sinks.console import ConsoleSink

        sinks.append(ConsoleSink(config.console, config.log_every))
    if config.wandb.mode != "off":
        from trainsys.telemetry.sinks.wandb import WandbSink

        sinks.append(WandbSink(config.wandb, say))
    if config.tensorboard:
        from trainsys.telemetry.sinks.tensorboard import TensorBoardSink

        sinks.append(TensorBoardSink())
    if config.prometheus_port:
        from trainsys.telemetry.sinks.prometheus import PrometheusSink

        sinks.append(PrometheusSink(config.prometheus_port, config.prometheus_address))
    return Sinks(sinks, warn)
