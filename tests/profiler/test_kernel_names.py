"""Kernel classes: names of the libraries of 2023 to 2026, each with its class and why (``kernel_names.csv``)."""

from __future__ import annotations

import csv
from pathlib import Path

from trainsys.profiler.trace.kernel_names import CLASS_NAMES, LONGEST, class_of_kernel, split_name

ROWS = list(csv.DictReader((Path(__file__).parent / "kernel_names.csv").open(encoding="utf-8")))


def test_every_name_has_its_class():
    assert len({row["name"] for row in ROWS}) >= 400
    wrong = []
    for row in ROWS:
        kind, why = class_of_kernel(row["name"])
        if CLASS_NAMES[kind] != row["class"]:
            wrong.append((row["name"], row["class"], CLASS_NAMES[kind], why))
    assert wrong == []


def test_namespaces_are_not_names():
    found = split_name("std::enable_if<!(false), void>::type internal::gemvx::kernel<int>(cublasGemvParamsEx<int>)")
    assert (found.namespaces, found.leaf) == (("internal", "gemvx"), "kernel")
    found = split_name("void fbgemm_gpu::(anonymous namespace)::_compute_FP8_quantize_cuda_kernel<float>(float const*)")
    assert (found.namespaces, found.leaf) == (("fbgemm_gpu",), "_compute_FP8_quantize_cuda_kernel")
    found = split_name("_ZN2ck16tensor_operation6device4gemmINS_3abcE")
    assert (found.namespaces, found.leaf) == (("ck", "tensor_operation", "device"), "gemm")


def test_a_name_of_any_length_costs_little():
    kind, _ = class_of_kernel("void ns::gemm_kernel<" + "x" * (50 * LONGEST) + ">")
    assert CLASS_NAMES[kind] == "matmul"
