"""One small set of real samples in every format: images that scikit-learn, scikit-image and matplotlib ship."""

import io
import json
import tarfile
from pathlib import Path

import matplotlib
import skimage
import sklearn

SHIPPED = {
    "china.jpg": Path(sklearn.__file__).parent / "datasets" / "images",
    "flower.jpg": Path(sklearn.__file__).parent / "datasets" / "images",
    "coins.png": Path(skimage.__file__).parent / "data",  # grey
    "logo.png": Path(skimage.__file__).parent / "data",  # with transparency
    "rocket.jpg": Path(skimage.__file__).parent / "data",
    "horse.png": Path(skimage.__file__).parent / "data",
    "no_time_for_that_tiny.gif": Path(skimage.__file__).parent / "data",
    "grace_hopper.jpg": Path(matplotlib.get_data_path()) / "sample_data",
}

# Images, question, answer; with further turns after them.
SAMPLES = [
    (["china.jpg"], "What is this?", "A temple."),
    (["flower.jpg"], 'And this? [1, {2}] \\ "quoted"', "A flower,\nseen from near."),
    ([], "Is ice cold? 冰冷吗？", "Yes.", "Is fire?", "No."),
    (["coins.png", "logo.png"], "Which is round?", "The coins <|im_end|> are."),
    (["grace_hopper.jpg"], "Who is this? <slice> <|im_start|>", "Grace Hopper.", "Born when?", "In 1906."),
    (["horse.png"], "Which animal?", "A horse."),
    (["no_time_for_that_tiny.gif"], "What moves?", "A cat."),
    (["rocket.jpg", "china.jpg", "flower.jpg"], "Order them.", "Rocket, temple, flower."),
]


def image_bytes(name):
    return (SHIPPED[name] / name).read_bytes()


def turns_of(sample):
    """(role, text) of every turn."""
    return [("assistant" if number % 2 else "user", text) for number, text in enumerate(sample[1:])]


def llava(sample, images=None):
    """The LLaVA form; `images` takes the place of the paths."""
    paths = sample[0] if images is None else images
    said = [{"from": "gpt" if role == "assistant" else "human", "value": text} for role, text in turns_of(sample)]
    said[0]["value"] = "<image>\n" * len(paths) + said[0]["value"]
    record = {"id": "x", "conversations": said}
    return record | ({"image": paths[0] if len(paths) == 1 else paths} if paths else {})


def sharegpt(sample):
    """`messages` and `images`, marks in the text."""
    said = [{"role": role, "content": text} for role, text in turns_of(sample)]
    said[0]["content"] = "<image>" * len(sample[0]) + said[0]["content"]
    return {"messages": said, "images": sample[0]}


def parts(sample):
    """`messages` with lists of parts."""
    said = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns_of(sample)]
    said[0]["content"] = [{"type": "image"} for _ in sample[0]] + said[0]["content"]
    return {"messages": said, "images": sample[0]}


def minicpm(sample):
    """MiniCPM-V's fine-tune form: images by name, shown where their names stand; one without a mark comes first."""
    said = [{"role": role, "content": text} for role, text in turns_of(sample)]
    if not sample[0]:
        return {"conversations": said}
    if len(sample[0]) == 1:
        return {"image": sample[0][0], "conversations": said}
    names = [f"<image_{number:02d}>" for number in range(len(sample[0]))]
    said[0]["content"] = "\n".join(names) + "\n" + said[0]["content"]
    # In the dictionary they may stand in any order.
    return {"image": dict(reversed(list(zip(names, sample[0], strict=True)))), "conversations": said}


def write_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        (folder / name).write_bytes(image_bytes(name))


def write_llava(folder):
    write_images(folder / "images")
    path = folder / "llava.json"
    path.write_text(json.dumps([llava(sample) for sample in SAMPLES]), encoding="utf-8")
    return {"path": str(path), "image_root": str(folder / "images")}


def write_lines(folder, form):
    write_images(folder)
    path = folder / "data.jsonl"
    lines = [json.dumps(form(sample), ensure_ascii=False) for sample in SAMPLES]
    path.write_text("\n".join(lines), encoding="utf-8")
    return {"path": str(path)}


def write_pretty(folder):
    write_images(folder)
    path = folder / "data.json"
    path.write_text(json.dumps([minicpm(sample) for sample in SAMPLES], indent=2), encoding="utf-8")
    return {"path": str(path)}


def files_of(sample):
    return [{"bytes": image_bytes(name), "path": name} for name in sample[0]]


def rows_with_bytes():
    """Columns as in LLaVA-OneVision, images as a list because some samples have several."""
    rows = []
    for sample in SAMPLES:
        record = llava(sample)
        record.pop("image", None)
        rows.append(record | {"images": files_of(sample), "data_source": "shipped"})
    return rows


def finevision_rows():
    rows = []
    for sample in SAMPLES:
        texts = [{"user": user, "assistant": answer} for user, answer in zip(sample[1::2], sample[2::2], strict=True)]
        rows.append({"images": files_of(sample), "texts": texts, "source": "shipped", "relevance_min": 4})
    return rows


def write_parquet(folder, rows):
    import pyarrow
    import pyarrow.parquet

    half = len(rows) // 2
    for number, some in enumerate((rows[:half], rows[half:])):
        table = pyarrow.Table.from_pylist(some)
        pyarrow.parquet.write_table(table, folder / f"part-{number}.parquet", row_group_size=3)
    return {"path": str(folder)}


def write_arrow(folder, rows):
    """As `datasets.Dataset.save_to_disk` lays it out."""
    import pyarrow

    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    half = len(rows) // 2
    schema = pyarrow.Table.from_pylist(rows).schema
    for name, some in zip(names, (rows[:half], rows[half:]), strict=True):
        table = pyarrow.Table.from_pylist(some, schema=schema)
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return {"path": str(folder)}


def add_member(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_tar(folder, format=tarfile.PAX_FORMAT, deep="a/"):
    half = len(SAMPLES) // 2
    for shard, some in enumerate((SAMPLES[:half], SAMPLES[half:])):
        with tarfile.open(folder / f"{shard:03d}.tar", "w", format=format) as archive:
            for number, sample in enumerate(some):
                for place, name in enumerate(sample[0]):
                    add_member(archive, f"{deep}{number:04d}.{place}{Path(name).suffix}", image_bytes(name))
                record = llava(sample)
                record.pop("image", None)
                add_member(archive, f"{deep}{number:04d}.json", json.dumps(record).encode())
    return {"path": str(folder)}


def write_array_record(folder, source):
    """All samples of a source, in two shards."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from uhd_jax.data.record_format import PackedSample, encode

    half = len(source) // 2
    for shard, numbers in enumerate((range(half), range(half, len(source)))):
        writer = ArrayRecordWriter(str(folder / f"data-{shard}.arrayrecord"), "group_size:1")
        for index in numbers:
            sample = PackedSample(tuple(source.messages(index)), tuple(source.files(index)), source.where(index))
            writer.write(encode(sample))
        writer.close()
    return {"path": str(folder)}
