"""The commands that measure the input pipeline: they run, and their figures hold together."""

import gc
import json
import os

import numpy as np
import pytest

from uhd_jax.analysis import bench_data, measure_data
from uhd_jax.slicing.plan import Size


def test_the_pipeline_is_timed_against_pillow_alone(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_data", "--json", "--sizes", "112x168", "--images=2", "--repeats=1"])
    bench_data.main()
    (speed,) = json.loads(capsys.readouterr().out)
    assert (speed["height"], speed["width"], speed["views"]) == (112, 168, 1)
    assert 0 < speed["decode_ms"] < speed["pipeline_ms"] and speed["resize_ms"] > 0
    floor = speed["decode_ms"] + speed["resize_ms"]
    assert speed["floor_share"] == pytest.approx(floor / speed["pipeline_ms"])
    assert speed["images_per_core_second"] == pytest.approx(1000 / speed["pipeline_ms"])
    table = bench_data.table([bench_data.Speed(**speed)])
    assert "112x168" in table and f"{speed['floor_share']:.1%}" in table


@pytest.mark.parametrize("name", ["array", "lines", "parquet", "tar"])
def test_rows_are_written_and_found(tmp_path, name):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    path = measure_data._write(tmp_path, name, 10_120)  # parquet is written in parts of 10,000
    source = measure_data_source(name, path)
    assert len(source) == 10_120
    text = "".join(part for message in source.messages(10_119) for part in message.parts if isinstance(part, str))
    assert "What is in 10119?" in text


def measure_data_source(name, path):
    from uhd_jax.config import DataConfig
    from uhd_jax.data.sources import make_source

    return make_source(DataConfig(measure_data._KIND[name], {"path": str(path)}))


def test_opening_is_measured_in_a_process_of_its_own(tmp_path):
    ((first, mib),) = measure_data.measure_rows(tmp_path, "lines", 50, openings=1)
    assert 0 < first < 10 and -50 < mib < 100
    with pytest.raises(RuntimeError, match="lines: .*holds no record"):
        measure_data.measure_rows(tmp_path, "lines", 0, openings=1)


def test_memory_does_not_grow_over_epochs(tmp_path):
    """In this process, where nothing but the epochs goes on; `measure_data workers` looks at worker processes."""
    size = Size(224, 336)
    path = bench_data.write_photographs(tmp_path, size, 6, samples=3000)
    batches = bench_data.open_batches(path, size, packing_window=6, prefetch=0)
    resident = []
    for _ in range(40):  # times each image
        while next(batches)[1].read < 6 * (len(resident) + 1):
            pass
        gc.collect()
        resident.append(measure_data._resident(os.getpid()) / 2**20)
    batches.close()
    # Six images of 0.3 MB as Pillow has them: kept, they would be 50 MB in 30 epochs.
    assert np.median(resident[-5:]) - np.median(resident[5:15]) < 8
