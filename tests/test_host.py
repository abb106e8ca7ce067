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


def test_a_result_names_its_processor():
    host = {"cpu": "Fast 3000", "cores": 8}
    assert stored.processor(host) == "Fast 3000, 8 cores"
    assert stored.processor(host | {"vectors": None}) == "Fast 3000, 8 cores"
    assert stored.processor(host | {"vectors": "avx2"}) == "Fast 3000, 8 cores with avx2"
