"""Prompts and patches of MiniCPM-V 4.6 equal those of transformers' processor, images and videos alike.

The processor's video part needs torchvision; where that is missing an instance is made without it, for images alone.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from golden_v4 import padded_views, split_views
from hf46 import copy_tokenizer, make_checkpoint
from image_files import channels_first
from PIL import Image
from safetensors.numpy import save_file

import uhd_jax
from uhd_jax.convert.minicpmv46 import MINICPM_V_4_6
from uhd_jax.convert.tables import export_tensors
from uhd_jax.data.chat import ImagePart, Message, VideoPart, encode_chat
from uhd_jax.generation.prompt import PromptError
from uhd_jax.slicing.plan import Size
from uhd_jax.slicing.plan import plan_image as plan
from uhd_jax.slicing.video import Video

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("unoptimised")
try:
    import torchvision
except ImportError:
    torchvision = None

# As in Qwen3.5's template: parts with nothing between, a switch for thinking, thoughts of earlier turns left out.
OTHER_TEMPLATE = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- macro show(content, trim) %}
{%- if content is string %}{{- content.strip() if trim else content }}
{%- else %}{%- for part in content %}
{%- if part.type == 'image' %}{{- '<|image_pad|>' }}
{%- elif 'video' in part.type %}{{- '<|video_pad|>' }}
{%- else %}{{- part.text }}{% endif %}
{%- endfor %}{% endif %}
{%- endmacro %}
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- set content = show(message.content, message.role == 'assistant') %}
{%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking %}{{- '<think>\\n' }}
{%- else %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
RNG = np.random.default_rng(5)
WIDE, SMALL, TALL = (RNG.integers(0, 256, size, np.uint8) for size in ((90, 260, 3), (40, 50, 3), (300, 100, 3)))


def user(*parts):
    return {"role": "user", "content": list(parts)}


def image(pixels):
    return {"type": "image", "image": pixels}


def text(said):
    return {"type": "text", "text": said}


CONVERSATIONS = {
    "question": [{"role": "user", "content": "How many?"}],
    "one_image": [user(image(WIDE), text("What is this?"))],
    "three_images": [user(image(WIDE), image(SMALL), text("Compare:"), image(TALL), text("which is taller?"))],
    "system_and_turns": [
        {"role": "system", "content": "Be brief."},
        user(image(SMALL), text("  Who?\nWhere? ")),
        {"role": "assistant", "content": "<think>\nHm, let me see.\n</think>\n\nA cat."},
        user(text("And here?"), image(TALL)),
        {"role": "assistant", "content": [text("A dog.")]},
        user(text("Sure?")),
    ],
}


@pytest.fixture(scope="module", params=["chatml", "other"])
def folder(request, tmp_path_factory):
    """An export: with the template that it writes, or with one that the tokenizer came with."""
    made, path = (tmp_path_factory.mktemp(name) for name in ("made", "export"))
    make_checkpoint(made)
    tokenizer = copy_tokenizer(made / "tokenizer")
    if request.param == "other":
        for place in (made, tokenizer):
            (place / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    ours = uhd_jax.load(made)
    MINICPM_V_4_6.write_files(ours.config, tokenizer, path)
    tensors = export_tensors(MINICPM_V_4_6.table(ours.config), jax.tree.map(np.asarray, ours.params))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return uhd_jax.load(folder)


@pytest.fixture(scope="module")
def processor(folder):
    if torchvision:
        return transformers.AutoProcessor.from_pretrained(folder, use_fast=False)
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
    from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor

    made = MiniCPMV4_6Processor.__new__(MiniCPMV4_6Processor)
    made.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made.image_processor = MiniCPMV4_6ImageProcessorPil.from_pretrained(folder)
    made.chat_template = (folder / "chat_template.jinja").read_text()
    made.slice_mode, made.default_use_image_id = True, made.image_processor.use_image_id
    for name in ("image", "video"):
        setattr(made, f"{name}_token", getattr(made.tokenizer, f"{name}_token"))
        setattr(made, f"{name}_token_id", getattr(made.tokenizer, f"{name}_token_id"))
    for name in ("image", "slice", "image_id"):
        for end in ("start", "end"):
            setattr(made, f"{name}_{end}_token", getattr(made.tokenizer, f"{name}_{end}_token"))
    return made


def pil_processor(processor):
    """Its images by Pillow, as the training code had them; torchvision's resizing differs by a grey level."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    return MiniCPMV4_6ImageProcessorPil(**processor.image_processor.to_dict())


def theirs(processor, conversation, images_kwargs=None, use_image_id=None, **variables):
    """Ids, and what the image processor made."""
    parts = [p for m in conversation if not isinstance(m["content"], str) for p in m["content"]]
    shown = [Image.fromarray(part["image"]) for part in parts if part["type"] == "image"]
    bare = [{key: part[key] for key in ("type", "text") if key in part} for part in parts]
    rest = iter(bare)
    plain = [
        m if isinstance(m["content"], str) else m | {"content": [next(rest) for _ in m["content"]]}
        for m in conversation
    ]
    template = processor.chat_template
    prompt = processor.tokenizer.apply_chat_template(
        plain, chat_template=template, add_generation_prompt=True, tokenize=False, **variables
    )
    replaced = []
    made = {}
    if shown:
        processor.image_processor = pil_processor(processor)
        made, replaced = processor._process_images(shown, **(images_kwargs or {}), return_tensors="np")
        if processor.default_use_image_id if use_image_id is None else use_image_id:
            replaced = processor._prepend_local_ids([prompt], replaced, processor.image_token)
    expanded, _ = processor.get_text_with_replacements([prompt], replaced, [])
    return processor.tokenizer(expanded[0])["input_ids"], made


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_have_the_same_ids(ours, processor, name):
    conversation = CONVERSATIONS[name]
    for thinking in (None, True, False):
        variables = {} if thinking is None else {"enable_thinking": thinking}
        ids, _ = theirs(processor, conversation, **variables)
        assert ours.prepare(conversation, thinking=thinking).token_ids.tolist() == list(ids)


def test_patches_are_the_same(ours, processor):
    conversation = CONVERSATIONS["three_images"]
    for mode, limit in (("16x", None), ("4x", None), ("16x", 1), ("4x", 4)):
        kwargs = {"downsample_mode": mode} | ({"max_slice_nums": limit} if limit else {})
        ids, made = theirs(processor, conversation, kwargs)
        prepared = ours.prepare(conversation, mode=mode, max_slices=limit)
        assert prepared.token_ids.tolist() == list(ids)
        grids = [tuple(view.patch_grid) for p in prepared.plans for view in p.views]
        assert grids == [tuple(grid) for grid in np.array(made["target_sizes"]).tolist()]
        levels = ours.config.merge_levels(mode)
        views = split_views(np.array(made["pixel_values"]), np.array(made["target_sizes"]))
        views = padded_views(views, grids, levels, max(map(len, views)))
        for own, view in zip(prepared.views, views, strict=True):
            np.testing.assert_allclose(channels_first(own) / 127.5 - 1, view[: len(own)], atol=1e-6)


def test_without_image_ids(folder, processor, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "processor_config.json").unlink()
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"use_image_id": False}
    (copy / "preprocessor_config.json").unlink()
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    conversation = CONVERSATIONS["three_images"]
    ids, _ = theirs(processor, conversation, use_image_id=False)
    assert uhd_jax.load(copy).prepare(conversation).token_ids.tolist() == list(ids)


def test_a_question_with_images_is_a_conversation_of_one_turn(ours):
    one = ours.prepare("What is this?", [WIDE, SMALL])
    other = ours.prepare([user(image(WIDE), image(SMALL), text("What is this?"))])
    assert one.token_ids.tolist() == other.token_ids.tolist()


def test_marks_in_texts_stay_text(ours):
    plain = ours.prepare("<|im_end|><image>\ue0000\ue001").token_ids
    marks = {ours.tokenizer.special(mark) for mark in ("<image>", "<|im_end|>")}
    start = ours.prepare("").token_ids
    assert sum(int(i) in marks for i in plain) == sum(int(i) in marks for i in start)
    assert "<|im_end|><image>\ue0000\ue001" in ours.tokenizer.decode(plain)


@pytest.mark.parametrize(("stack", "slices"), [(1, 1), (3, 9)])
def test_videos_have_the_same_ids_and_grids(folder, processor, stack, slices, tmp_path):
    pytest.importorskip("torchvision")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["video_processor"] |= {"stack_frames": stack, "max_slice_nums": slices}
    (copy / "processor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps(settings))
    ours, processor = uhd_jax.load(copy), transformers.AutoProcessor.from_pretrained(copy)
    first, second = (RNG.integers(0, 256, (count, 100, 130, 3), np.uint8) for count in (25, 12))
    clips = [Video(list(first), fps=10.0), Video(list(second), fps=4.0)]
    conversation = [
        user(image(SMALL), {"type": "video", "video": clips[0]}, {"type": "video", "video": clips[1]}, text("When?"))
    ]
    prompt = processor.tokenizer.apply_chat_template(
        [user({"type": "image"}, {"type": "video"}, {"type": "video"}, text("When?"))],
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    metadata = [
        dict(
            total_num_frames=len(frames),
            fps=clip.fps,
            duration=len(frames) / clip.fps,
            frames_indices=list(range(len(frames))),
        )
        for frames, clip in ((first, clips[0]), (second, clips[1]))
    ]
    made = processor(
        text=[prompt],
        images=[Image.fromarray(SMALL)],
        videos=[torch.tensor(frames).permute(0, 3, 1, 2) for frames in (first, second)],
        video_metadata=[transformers.video_utils.VideoMetadata(**one) for one in metadata],
        do_sample_frames=True,
        return_tensors="pt",
    )
    prepared = ours.prepare(conversation)
    assert prepared.token_ids.tolist() == made["input_ids"][0].tolist()
    grids = [tuple(view.patch_grid) for p in prepared.plans[1:] for view in p.views]
    assert grids == [tuple(grid) for grid in made["target_sizes_videos"].tolist()]
    model = transformers.AutoModelForImageTextToText.from_pretrained(copy, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(**made).logits[0].numpy()
    logits = ours.logits(prepared.token_ids, [SMALL], clips)
    # torchvision resizes within a grey level of Pillow, which moves logits by a little; another order moves them by 1
    assert np.abs(logits - expected).max() < 0.1
    swapped = ours.logits(prepared.token_ids, [SMALL], [Video(list(first[::-1]), fps=10.0), clips[1]])
    assert np.abs(swapped - expected).max() > 0.3


def test_a_video_is_an_id_and_its_pictures_without_anything_between(ours):
    plans = [plan(Size(100, 130), ours.config, max_slices=1)] * 2
    chat = ours.config.chat
    sample = encode_chat([Message("user", (ImagePart(0), "?"))], plans[:1], ours.tokenizer, chat, True)
    filmed = encode_chat([Message("user", (VideoPart(0, 2), "?"))], plans, ours.tokenizer, chat, True)
    special = ours.tokenizer.special
    block = [special("<image>"), *[special("<|image_pad|>")] * plans[0].visual_tokens, special("</image>")]
    clip = [special("<|video_pad|>") if i == special("<|image_pad|>") else i for i in block]
    whole = sample.tokens.tolist()
    start = next(i for i in range(len(whole)) if whole[i : i + len(block)] == block)
    assert filmed.tokens.tolist() == whole[:start] + clip + clip + whole[start + len(block) :]
    assert filmed.view.max() == 1 and filmed.needs.views == 2


def test_generate_answers_conversations_and_videos(ours):
    video = Video([SMALL] * 5, fps=2.0)
    clip = {"type": "video", "video": video}
    asked = [user(clip, text("When?"))]
    alone = ours.generate(asked, max_new_tokens=4)
    assert isinstance(alone, str)
    assert alone == ours.generate("When?", videos=[video], max_new_tokens=4)
    assert ours.generate([asked, "Why?"], max_new_tokens=4) == [alone, ours.generate("Why?", max_new_tokens=4)]


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([{"content": "x"}], {}, r"message\[0\]: needs a role"),
        ([{"role": "user", "content": 3}], {}, r"message\[0\].content: a text or a list of parts, not int"),
        ([user({"type": "audio"})], {}, r"content\[0\]: its type must be text, image or video, not 'audio'"),
        ([user({"type": "image"})], {}, r"has no 'image'"),
        ([user(text("x"))], {"images": [SMALL]}, "a conversation has its images"),
        ([{"role": "tool", "content": "x"}], {}, "role 'tool'"),
        ([user(text("x")), {"role": "assistant", "content": "y"}], {}, "nothing to generate"),
        ("x", {"videos": "clip.mp4"}, r"videos must be a list.*videos=\[video\]"),
        (["x", "y"], {"videos": [[]]}, "2 prompts, but 1 lists of videos"),
        ([user(text("\ud800"))], {}, "lone surrogate"),
    ],
)  # fmt: skip
def test_bad_conversations(ours, prompt, arguments, message):
    with pytest.raises(PromptError, match=message):
        ours.generate(prompt, **arguments)


def test_templates_that_refuse_or_lose_an_image_say_so(ours, monkeypatch):
    monkeypatch.setattr(ours, "config", ours.config)
    for template, message in (
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out 1 images"),
        ("<|image_pad|><|image_pad|>", "more '<|image_pad|>' than"),
        ("{% if %}", "no Jinja"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
    ):
        monkeypatch.setattr(ours.tokenizer, "chat_template", template)
        with pytest.raises(PromptError) as error:
            ours.prepare("x", [SMALL])
        assert message in str(error.value)
