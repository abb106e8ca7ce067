"""What `tune` writes on a GPU, and its command."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from conv_pallas import _tuning_gpu, aot, conv1d, explanation
from conv_pallas.__main__ import main

pytest.importorskip("jax_triton")

from conv_pallas.kernels import records, triton_tuned
from tests.tuning.gpu import structs, tune_dense, who_runs

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"tiles": {"a": 1}}', '{"tiles": {"a": ["b"]}}', '{"against_xla": {"a": {}}}',
        '{"formulations": {"a": {}}}',
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_ours_is_named(one_tile, text):
    _, file = one_tile
    file.write_text(text)
    message = f"{file.name} is not what .*tune writes: delete it"
    with pytest.raises(ValueError, match=message):
        who_runs()
    with pytest.raises(ValueError, match=message):
        tune_dense()
    x, w = structs()
    f = functools.partial(conv1d, implementation="xla_native")  # which asks nobody
    assert aot.lower_for("h200", f, x, w)


def test_what_another_process_writes_meanwhile_stays(one_tile, monkeypatch):
    _, file = one_tile

    def measured(calls, settings):
        triton_tuned.RECORDS.add(file, "NVIDIA H200", {"tiles": {"theirs": (1, 2)}})
        return dict.fromkeys(calls, (1.0,))

    monkeypatch.setattr(_tuning_gpu._measure, "interleaved", measured)
    tune_dense()
    stored = json.loads(file.read_text())
    assert stored["tiles"]["theirs"] == [1, 2] and len(stored["tiles"]) == 4
    assert [found.name for found in file.parent.iterdir()] == [file.name]  # nothing is left over


def test_what_another_thread_compiles_meanwhile_has_its_own_tile(one_tile):
    triton_tuned.RECORDS.add(one_tile[1], "NVIDIA H200", {"tiles": {"a kernel": (1, 2)}})
    with triton_tuned.trial((3, 4)) as asked, ThreadPoolExecutor() as pool:
        assert triton_tuned.lookup("a kernel") == (3, 4)
        assert pool.submit(triton_tuned.lookup, "a kernel").result() == (1, 2)
        assert asked == ["a kernel"]


def test_a_folder_of_ones_own_has_the_last_word(one_tile, monkeypatch, tmp_path):
    seconds, shipped = one_tile
    tile = (64, 64, 32, 4, 3)
    seconds[tile] = 0.5
    tune_dense()
    assert who_runs() == ["triton"] * 3
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    records.forget()
    seconds[tile], seconds["xla"] = 1.0, 0.5
    assert tune_dense() == {}
    assert who_runs() == ["xla"] * 3
    assert set(triton_tuned.RECORDS.content("NVIDIA H200")["tiles"].values()) == {None}
    assert {tile} == set(map(tuple, json.loads(shipped.read_text())["tiles"].values()))


# --- the command ----------------------------------------------------------------------------------


def _command(*words):
    return main(["tune", "dtype=bfloat16", *words])


def test_the_command_tunes_a_layer(one_tile, capsys):
    seconds, _ = one_tile
    seconds[None] = 0.5
    assert _command("N=2", "T=512", "C=64", "K=4", "--seconds", "600") == 0
    told = capsys.readouterr().out
    assert "forward: 2.00 times as fast as XLA" in told and "(64, 64, 32, 4, 3)" in told
    assert who_runs() == ["triton"] * 3
    assert _command("N=2", "T=512", "C=64", "K=4", "--quick") == 0
    assert "(64, 64, 32, 4, 3)" not in capsys.readouterr().out


def test_the_command_says_what_is_wrong(one_tile, capsys, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(file / "folder"))
    assert _command("N=2", "T=512", "C=64", "K=3") == 1
    assert "a folder that can be written to in CONV_PALLAS_TUNED" in capsys.readouterr().err
    assert _command("N=2", "T=0", "C=64", "K=3") == 1
    monkeypatch.setattr(explanation, "default_platform", lambda: "tpu")
    assert _command("N=2", "T=512", "C=64", "K=3") == 1
    assert "tune needs an NVIDIA GPU or a CPU" in capsys.readouterr().err
