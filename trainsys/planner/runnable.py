"""Which layouts an engine can run: its table in `trainsys.capabilities`, asked once for each kind of layout."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainsys.capabilities import unable
from trainsys.config.engines import EngineName
from trainsys.config.model import ModelConfig
from trainsys.config.run import RunConfig
from trainsys.layout import Layout
from trainsys.planner.settings import AXES, Columns, named, run_settings

_BY_MORE_THAN_ONE = ("dp_replicate", "dp_shard", "cp", "tp", "ep")  # how many there are is not asked


def runnable(engine: EngineName, model: ModelConfig, layouts: Columns, ulysses: bool) -> NDArray[np.bool_]:
    """True for each layout that ``engine`` runs. Only the layout is judged, by a run that asks for nothing else.

    ``ulysses``: what context parallelism is by.
    """
    if engine == "native" or not len(layouts["pp"]):
        return np.ones(len(layouts["pp"]), bool)
    kinds = [(layouts[k] > 1).astype(float) for k in _BY_MORE_THAN_ONE]
    kinds += [layouts[k] for k in ("pp", "vpp", "schedule", "recompute", "reshard")]
    _, first, of = np.unique(np.stack(kinds, axis=1), axis=0, return_index=True, return_inverse=True)
    context = {"context": {"flavour": "ulysses"}} if ulysses else {}
    able = []
    for i in first:
        asked = run_settings(named(layouts, i))
        asked["parallel"] |= context
        run = RunConfig.model_validate({"engine": engine, "model": model, **asked, "train": {"seq_len": 1}})
        able.append(not unable(run, Layout(**{axis: int(layouts[axis][i]) for axis in AXES})))
    return np.asarray(able)[of.ravel()]
