"""A JSONL file of conversations about images whose headers alone are real, for tests of what is planned from sizes."""

import json

import numpy as np
from image_files import png_of


def write_records(folder, count=60, seed=0):
    """Samples with up to three images of many sizes, for the source "json".

    Every fourth has more rounds of question and answer before the last one. Sample 3 has no answer, 9 an empty one; the
    image of 5 is missing; 11 has a role that does not exist.
    """
    random, more = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    lines = []
    for number in range(count):
        names = []
        for image in range(random.integers(0, 4)):
            name = f"{number}_{image}.png"
            width, height = (int(side) for side in np.exp(random.uniform(3, 7, 2)))
            (folder / name).write_bytes(png_of(width, height))
            names.append(name)
        question = [{"type": "image"} for _ in names] + [{"type": "text", "text": "What? " * int(random.integers(9))}]
        answer = "Words. " * int(random.integers(1, 30))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if number % 4 == 0:
            for round in range(more.integers(1, 5)):
                shown = names[round : round + 1]
                said = [{"type": "image"} for _ in shown] + [{"type": "text", "text": "And this? " * (1 + round)}]
                messages[-2:-2] = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
                question.remove({"type": "image"}) if shown else None
        lines.append({"messages": messages, "images": names})
    lines[3] = {"messages": [{"role": "user", "content": "only a question"}]}
    lines[5]["images"] = ["absent.png"]
    lines[5]["messages"][0]["content"] = [{"type": "image"}]
    lines[9]["messages"][1]["content"] = " "
    lines[11]["messages"][0]["role"] = "bot"
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
