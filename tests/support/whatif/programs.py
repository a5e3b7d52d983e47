"""Training steps drawn at random, by what holds them up."""

from __future__ import annotations

import numpy as np

from support.whatif.machine import COMM, COMPUTE, COPY, MATMUL, Program, Traits

GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas"
NORM = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16> >"
NCCL = "ncclDevKernel_{}(ncclDevKernelArgsStorage<4096ul>)"
MAIN, COMM_STREAM, COPY_STREAM = 7, 20, 24
SCENARIOS = (
    "item",  # reads a number from the device, by cudaStreamSynchronize
    "device_sync",  # cudaDeviceSynchronize or cudaEventSynchronize
    "blocking_copy",  # copies of pageable memory
    "poll",  # loops of cudaEventQuery or cudaStreamQuery
    "spin",  # waits that make no call: a kernel writes to memory that the host reads
    "queue",  # no waits, but as many launches under way as there can be
    "launch_bound",
    "comm_bound",
    "loader_bound",
)


class _Writer:
    """One program; durations jitter by kernel, costs by call."""

    def __init__(self, scenario: str, seed: int) -> None:
        self.rng = rng = np.random.default_rng((seed, SCENARIOS.index(scenario)))
        self.scenario = scenario
        launch_bound = scenario == "launch_bound"
        overhead = int(rng.choice([0, 700, 2_000]))
        """What the profiler adds to each call and operator."""
        traits = Traits(
            call_ns=int(rng.integers(3_000, 6_000)) + overhead,
            latency_ns=int(rng.integers(3_500, 7_500)),
            gap_ns=int(rng.integers(700, 1_800)),
            cross_ns=int(rng.integers(900, 3_000)),
            return_ns=int(rng.integers(3_000, 9_000)),
            queue=int(rng.integers(24, 120)) if scenario == "queue" else 1024,
            prefetch=int(rng.choice([0, 2, 4])) if scenario == "loader_bound" else 2,
        )
        self.p = Program(traits)
        self.think_ns = int(10 ** rng.uniform(4.1, 4.6) if launch_bound else 10 ** rng.uniform(3.3, 4.0)) + overhead
        self.gemm_ns = int(10 ** (rng.uniform(3.7, 4.8) if launch_bound else rng.uniform(5.0, 5.9)))
        self.small_ns = int(10 ** (rng.uniform(3.3, 4.6) if launch_bound else rng.uniform(4.3, 5.1)))
        self.jitter = float(rng.uniform(0.005, 0.1))
        self.layers, self.steps = int(rng.integers(3, 9)), int(rng.integers(4, 7))
        self.backward_thread = bool(rng.random() < 0.5)
        style = ["ddp", "fsdp"] if scenario == "comm_bound" else ["none", "none", "ddp", "fsdp"]
        self.style = str(rng.choice(style))
        layer = 2 * self.gemm_ns + 3 * self.small_ns
        low, high = (0.6, 2.5) if scenario == "comm_bound" else (0.1, 0.5)
        self.comm_ns = int(layer * rng.uniform(low, high))
        self.load_ns = int(3 * self.layers * layer * (rng.uniform(1.1, 2.5) if scenario == "loader_bound" else 0.2))
        self.batch_copies = bool(rng.random() < 0.5)
        self.pageable = scenario in ("blocking_copy", "loader_bound") and bool(rng.random() < 0.5)
        self.copy_stream = bool(rng.random() < 0.5)
        self.waits_in_layer = bool(rng.random() < 0.4)
        self.call = str(rng.choice(["cudaEventQuery", "cudaStreamQuery"]))
        self.period_ns = int(10 ** rng.uniform(4.0, 5.0))
        self.early_ns = int(rng.choice([0, 20_000]))
        self.count = 0

    def _ns(self, ns: float, spread: float | None = None) -> int:
        return max(500, round(ns * self.rng.lognormal(0.0, self.jitter if spread is None else spread)))

    def kernel(self, kind: str, ns: int, stream: int = MAIN, name: str = "") -> None:
        self.p.work(self._ns(self.think_ns, 0.3))
        call = "cudaLaunchKernelExC" if kind in (MATMUL, COMM) else "cudaLaunchKernel"
        self.p.launch(name or (GEMM if kind == MATMUL else NORM), kind, stream, self._ns(ns), call)

    def collective(self, op: str, wait_for_main: bool = True) -> str:
        """On its own stream, after what was launched so far; gives the event that it is over."""
        self.count += 1
        if wait_for_main:
            self.p.record(f"main{self.count}", MAIN)
            self.p.stream_waits(COMM_STREAM, f"main{self.count}")
        self.kernel(COMM, self.comm_ns, COMM_STREAM, NCCL.format(op))
        self.p.record(f"comm{self.count}", COMM_STREAM)
        return f"comm{self.count}"

    def wait(self) -> None:
        """For the device, as this scenario does."""
        p, s = self.p, self.scenario
        if s == "device_sync" and self.rng.random() < 0.5:
            p.sync_device()
        elif s in ("device_sync", "poll", "spin"):
            self.count += 1
            p.record(f"wait{self.count}", MAIN)
            if s == "device_sync":
                p.sync_event(f"wait{self.count}")
            elif s == "poll":
                p.poll(f"wait{self.count}", self.period_ns, self.call)
            else:
                p.spin(f"wait{self.count}", self.early_ns)
        elif s == "blocking_copy":
            p.blocking_copy("Memcpy DtoH (Device -> Pageable)", MAIN, self._ns(8_000), "cudaMemcpyAsync")
        elif s != "queue":
            p.work(self._ns(3_000))
            p.launch("Memcpy DtoH (Device -> Pinned)", COPY, MAIN, self._ns(2_000), "cudaMemcpyAsync")
            p.sync_stream(MAIN)

    def body(self) -> None:
        self.kernel(MATMUL, self.gemm_ns)
        self.kernel(COMPUTE, self.small_ns)
        self.kernel(MATMUL, self.gemm_ns)
        self.kernel(COMPUTE, self.small_ns)
        self.kernel(COMPUTE, self.small_ns)

    def forward(self) -> None:
        events = [self.collective("AllGather_RING_LL", wait_for_main=False)] if self.style == "fsdp" else []
        for layer in range(self.layers):
            if events and layer + 1 < self.layers:
                events.append(self.collective("AllGather_RING_LL", wait_for_main=False))
            if events:
                self.p.stream_waits(MAIN, events[layer])
            self.body()
            if self.waits_in_layer and layer % 2 and self.scenario not in ("launch_bound", "comm_bound"):
                self.wait()

    def backward(self) -> None:
        last = ""
        for _ in range(self.layers):
            self.body()
            self.body()
            if self.style != "none":
                last = self.collective("ReduceScatter_Sum_bf16_RING_LL")
        if last:
            self.p.stream_waits(MAIN, last)

    def write(self) -> Program:
        p = self.p
        for _ in range(self.steps):
            p.step()
            p.work(self._ns(20_000))
            p.load(self._ns(self.load_ns), self._ns(15_000))
            if self.batch_copies:
                stream = COPY_STREAM if self.copy_stream else MAIN
                if self.pageable:
                    p.blocking_copy("Memcpy HtoD (Pageable -> Device)", stream, self._ns(90_000), "cudaMemcpyAsync")
                else:
                    p.launch("Memcpy HtoD (Pinned -> Device)", COPY, stream, self._ns(60_000), "cudaMemcpyAsync")
                if self.copy_stream:
                    p.record("batch", COPY_STREAM)
                    p.stream_waits(MAIN, "batch")
            self.forward()
            if self.backward_thread:
                p.hand_over(2, self._ns(60_000, 0.3))
            self.backward()
            if self.backward_thread:
                p.hand_over(1, self._ns(60_000, 0.3))
            for _ in range(self.layers):
                self.kernel(COMPUTE, self.small_ns)
            self.wait()
            p.work(self._ns(40_000, 0.3))
        p.step()
        return p


def program(scenario: str, seed: int) -> Program:
    return _Writer(scenario, seed).write()
