"""Data in `gs://`, read with gcsfs itself from an emulator of Google Cloud Storage."""

import dataclasses
import socket

import pytest
from pipelines import TOKENIZER, equal, iterator, take
from test_source_formats import WRITE, opened

from uhd_jax.config import ChatConfig, DataConfig
from uhd_jax.data.index import index_path, open_index
from uhd_jax.data.known_from_index import known_samples
from uhd_jax.data.sources import SourceError, make_source
from uhd_jax.slicing.sizes import ImageRefused

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # would ask for credentials
    pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")
STAGE = {"packed_length": 700, "rows": 2, "max_slices": 4}
NAMES = ("LLaVA JSON", "parquet of FineVision", "datasets on disk", "WebDataset", "ArrayRecord")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Every format in a folder of its own of the bucket "shared": `DataConfig` by name."""
    import fsspec

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")  # for gcsfs
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{port}")  # for ArrayRecord
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="shared")
        server.start()
        fsspec.filesystem("gs").clear_instance_cache()
        found = {}
        for name in NAMES:
            folder = tmp_path_factory.mktemp("local") / name.replace(" ", "-")
            folder.mkdir()
            kind, write = WRITE[name]
            options = {key: value.replace(str(folder.parent), "gs://shared") for key, value in write(folder).items()}
            fsspec.filesystem("gs").put(str(folder), "gs://shared/", recursive=True)
            found[name] = DataConfig(kind, options)
        yield found
        server.stop()
        fsspec.filesystem("gs").clear_instance_cache()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("llava"), "LLaVA JSON")


@pytest.mark.parametrize("name", NAMES)
def test_every_format_in_a_bucket_gives_the_same_batches(there, local, name):
    data = there[name]
    assert data.options["path"].startswith("gs://shared/")
    source = make_source(data)
    assert len(source) == len(local) and source.where(0).startswith("gs://shared/")
    batches, expected = iterator(source, **STAGE), iterator(local, **STAGE)
    found = take(batches, 4)
    assert all(equal(a[0], b[0]) for a, b in zip(found, take(expected, 4), strict=True))
    assert found[-1][1].images and not any(found[-1][1].counters.values())
    batches.close(), expected.close()


@pytest.mark.parametrize("name", ["LLaVA JSON", "WebDataset", "ArrayRecord"])
def test_a_bucket_is_planned_from_an_index(there, local, tmp_path, monkeypatch, name):
    data = dataclasses.replace(there[name], index=str(tmp_path / "index.npz"))
    assert open_index(data, [ChatConfig()], path=index_path(data))[1]
    source = make_source(data)
    known = known_samples(data, source, ChatConfig(), TOKENIZER)
    assert known.count == len(local)
    monkeypatch.setattr(source, "sizes", None)  # is not needed again
    wide = STAGE | {"packed_length": 2000}  # all fit whole
    batches, expected = iterator(source, known=known, **wide), iterator(local, **wide)
    assert all(equal(a[0], b[0]) for a, b in zip(take(batches, 4), take(expected, 4), strict=True))
    batches.close(), expected.close()


def test_what_is_not_in_the_bucket_is_named(there):
    with pytest.raises(SourceError, match=r"^gs://shared/nowhere\.json: "):
        make_source(DataConfig("json", {"path": "gs://shared/nowhere.json"}))
    options = dict(there["LLaVA JSON"].options) | {"image_root": "gs://shared/nowhere"}
    with pytest.raises(ImageRefused, match=r"gs://shared/nowhere/china\.jpg: cannot be read"):
        make_source(DataConfig("json", options)).sizes(0)
