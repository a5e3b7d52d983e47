"""Settings that advice may name: only values that the run's config does not have already."""

from __future__ import annotations

from trainsys.config.run import RunConfig
from trainsys.schedules.build import splits_backward

TILE = 64
"""Tensor cores and vector units work on multiples of this; other sizes are padded."""


class Settings:
    """``cfg`` None: the run's config is not known, and any setting may be named."""

    def __init__(self, cfg: RunConfig | None) -> None:
        self._cfg = cfg

    @property
    def captures(self) -> bool:
        """Whether profiler captures are taken."""
        return self._cfg is not None and self._cfg.telemetry.capture_every > 0

    @property
    def on_device(self) -> bool:
        """Whether the run is not on the CPU, where bf16 may be slower than fp32."""
        return self._cfg is None or self._cfg.train.device != "cpu"

    @property
    def can_compile(self) -> bool:
        """Whether the pipeline's schedule leaves blocks whole."""
        cfg = self._cfg
        return cfg is None or cfg.parallel.pp == 1 or not splits_backward(cfg.parallel.pipeline.schedule)

    def value(self, key: str) -> object:
        """What the config has under a dotted key; None where there is no config."""
        at: object = self._cfg
        for part in key.split("."):
            at = getattr(at, part, None)
        return at

    def is_set(self, setting: str) -> bool:
        """Whether ``key=value`` (and what follows a blank is a remark) is what the config has."""
        key, _, wanted = setting.split(" ")[0].partition("=")
        value = self.value(key)
        return value is not None and str(value).lower() == wanted

    def any_of(self, *settings: str, otherwise: str = "") -> str:
        """Those that are not set yet, joined with "or"; empty ones do not count."""
        found = [s for s in settings if s and not self.is_set(s)]
        return ", or ".join(found) or otherwise

    def first(self, *settings: str, otherwise: str) -> str:
        """The first that is not set yet."""
        return next((s for s in settings if s and not self.is_set(s)), otherwise)

    def more(self, key: str, *others: str) -> str:
        """Twice what it is, or those of ``others`` that are not set yet."""
        value = self.value(key)
        larger = f"a larger {key}"
        if isinstance(value, int) and not isinstance(value, bool):
            larger = f"{key}={max(2, 2 * value)}"
        return self.any_of(larger, *others)

    def less(self, key: str, least: int) -> str:
        """Half of it; empty where it is ``least`` already or no even number."""
        value = self.value(key)
        if self._cfg is None:
            return f"a smaller {key}"
        return f"{key}={value // 2}" if isinstance(value, int) and value > least and value % 2 == 0 else ""

    def bigger_micro_batch(self) -> str:
        """Twice the micro-batch, where a step has several of them and no pipeline needs them."""
        cfg = self._cfg
        if cfg is None:
            return "a larger train.micro_batch"
        data_ranks = max(1, cfg.parallel.dp_replicate) * max(1, cfg.parallel.dp_shard)
        # With dp_shard=-1 the number of ranks is not in the config: a batch of two micro-batches is taken for enough.
        if cfg.parallel.pp > 1 or cfg.train.global_batch < 2 * cfg.train.micro_batch * data_ranks:
            return ""
        return f"train.micro_batch={2 * cfg.train.micro_batch}"

    def shapes(self) -> str:
        """Which sizes of this rank's matmuls are no multiple of ``TILE``, in words; empty where all are."""
        cfg = self._cfg
        if cfg is None:
            return ""
        tp = max(1, cfg.parallel.tp)
        sizes = {
            "model.d_model": cfg.model.d_model, "model.d_ff / tp": cfg.model.d_ff // tp,
            "model.vocab / tp": cfg.model.vocab // tp,
        }  # fmt: skip
        odd = [f"{name}={size}" for name, size in sizes.items() if size % TILE]
        return f"sizes that are multiples of {TILE} ({', '.join(odd)})" if odd else ""
