"""What results tell of the processor that they are of."""

import pytest

from benchmarks import stored
from conv_pallas import _host
from conv_pallas._host import vectors  # as it is: every test has a processor of its own


@pytest.mark.parametrize(
    "told, expected",
    [
        ({"flags": "fpu sse2 avx avx2 fma"}, "avx2"),
        ({"flags": "avx avx2 avx512f avx512vl"}, "avx512f"),
        ({"flags": "avx avx2 avx512f avx512_bf16"}, "avx512_bf16"),
        ({"Features": "fp asimd sve"}, "sve"),
        ({"Features": "fp asimd"}, "asimd"),
        ({"flags": "fpu avx2x"}, None),
        ({}, None),
    ],
)
def test_the_widest_vectors(told, expected, monkeypatch):
    monkeypatch.setattr(_host, "_cpuinfo", lambda: told)
    assert vectors() == expected


@pytest.mark.parametrize(
    "limit, expected",
    [("AVX2", "avx2"), ("avx512", "avx512f"), ("AVX512_BF16", "avx512_bf16"), ("SSE4_2", None),
     ("AVX512_VNNI", "avx512f"), ("AMX", "amx_bf16")],
)  # fmt: skip
def test_xla_may_be_told_to_make_use_of_less(limit, expected, monkeypatch):
    flags = {"flags": "avx avx2 avx512f avx512_bf16 amx_bf16"}
    monkeypatch.setattr(_host, "_cpuinfo", lambda: flags)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/x --xla_cpu_max_isa={limit}")
    assert vectors() == expected


def test_a_result_names_its_processor():
    host = {"cpu": "Fast 3000", "cores": 8}
    assert stored.processor(host) == "Fast 3000, 8 cores"
    assert stored.processor(host | {"vectors": None}) == "Fast 3000, 8 cores"
    assert stored.processor(host | {"vectors": "avx2"}) == "Fast 3000, 8 cores with avx2"
