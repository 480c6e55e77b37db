"""Values of a config.json that no model can have: one line that names file and key, never a traceback."""

import numpy as np
import pytest
from checkpoints import read_checkpoint, write_checkpoint

from uhd_jax.convert.tables import ConvertError

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA = {"model_type": "llama", **SIZES, "vocab_size": 64, "rms_norm_eps": 1e-5}
HYBRID = LLAMA | {"model_type": "qwen3_5_text", "num_hidden_layers": 4, "linear_num_key_heads": 2}
HYBRID |= dict(linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4)
CLIP = {"model_type": "clip_vision_model", **SIZES, "patch_size": 14, "image_size": 56}
LLAVA = LLAMA | {"model_type": "llava_llama", "mm_projector_type": "adapt_spatial_resampler"}
NAMES = {
    "llama": ["model.embed_tokens.weight"],
    "qwen3_5_text": ["model.embed_tokens.weight"],
    "clip_vision_model": ["vision_model.embeddings.patch_embedding.weight"],
    "llava_llama": ["model.embed_tokens.weight"],
}


def _checkpoint(folder, config):
    """As many tensors as a small model has; most of them of names that nothing looks at."""
    kind = config["model_type"] if isinstance(config["model_type"], str) else "llama"
    tower = "model.vision_tower.vision_tower.vision_model."
    tensors = {name: np.zeros((2, 2), np.float32) for name in NAMES[kind]}
    tensors |= {f"more.{number}": np.zeros(1, np.float32) for number in range(8)}
    if kind == "llava_llama":
        tensors |= {f"{tower}embeddings.class_embedding": np.zeros(64, np.float32)}
        tensors |= {f"{tower}encoder.layers.{n}.mlp.fc1.weight": np.zeros((8, 64), np.float32) for n in range(3)}
        tensors |= {f"{tower}embeddings.patch_embedding.weight": np.zeros((64, 3, 2, 2), np.float32)}
        tensors |= {f"{tower}embeddings.position_embedding.weight": np.zeros((5, 64), np.float32)}
        tensors |= {f"model.mm_projector.query{n}": np.zeros((4, 8), np.float32) for n in ("", "_1")}
    return write_checkpoint(folder, tensors, config)


V2 = LLAVA | {"feature_mode": "featup_muti_res"}
WRONG = [
    (LLAMA | {"num_attention_heads": "four"}, "num_attention_heads: 'four' is not a whole number of at least 1"),
    (LLAMA | {"num_attention_heads": None}, "num_attention_heads: None is not a whole number"),
    (LLAMA | {"num_attention_heads": 0}, "num_attention_heads: 0 is not a whole number of at least 1"),
    (LLAMA | {"num_attention_heads": True}, "num_attention_heads: True is not"),
    (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000, but there are only 9 tensors"),
    (LLAMA | {"rms_norm_eps": "1e-6"}, "rms_norm_eps: '1e-6' is not a number"),
    (LLAMA | {"rope_parameters": [1]}, r"rope_parameters: \[1\] is not an object"),
    (LLAMA | {"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta: 'x' is not a number above 0"),
    (LLAMA | {"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta: 0 is not a number above 0"),
    (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps: nan is not a number above 0"),
    (LLAMA | {"rms_norm_eps": 10**400}, "rms_norm_eps: 10{76}... is not a number above 0 and below 1e30"),
    (LLAMA | {"vocab_size": 10**30}, "vocab_size: 10{30} is not a whole number of at least 1 and at most 2147483647"),
    (LLAMA | {"dtype": "floaty"}, "dtype: 'floaty' is not supported; it must be one of float32, bfloat16"),
    (LLAMA | {"torch_dtype": ["float32"]}, r"torch_dtype: \['float32'\] is not supported"),
    (LLAMA | {"text_config": [LLAMA]}, "text_config: .* is not an object"),
    (LLAMA | {"model_type": ["llama"]}, r"model_type: \['llama'\] is not a string"),
    (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads 4"),
    (LLAMA | {"max_position_embeddings": "4k"}, "max_position_embeddings: '4k' is not a whole number"),
    (LLAMA | {"attention_bias": True}, "config.json: attention_bias: True is not supported; it must be False"),
    (LLAMA | {"rope_scaling": {"rope_type": "llama3"}}, "json: rope_scaling.rope_type: 'llama3' is not supported"),
    (HYBRID | {"full_attention_interval": 0}, "full_attention_interval: 0 is not a whole number"),
    (HYBRID | {"num_hidden_layers": 6}, r"full_attention_interval \(or .*layer_types.*4 does not divide num_hidden_la"),
    (HYBRID | {"layer_types": "full_attention"}, "layer_types: 'full_attention' is not a list"),
    (CLIP | {"patch_size": 0}, "patch_size: 0 is not a whole number of at least 1"),
    (CLIP | {"image_size": None}, "image_size: None is not"),
    (CLIP | {"image_size": [56, 56]}, r"image_size: \[56, 56\] is not"),
    (CLIP | {"image_size": 7}, "image_size in patches: must be at least 1, not 0"),
    (CLIP | {"vision_config": None}, "vision_config: None is not an object"),
    (CLIP | {"vision_config": CLIP | {"hidden_size": "x"}}, "vision_config.hidden_size: 'x' is not"),
    (LLAVA | {"mm_vision_select_layer": "x"}, "mm_vision_select_layer: 'x' is not a whole number"),
    (LLAVA | {"mm_vision_select_layer": 22}, "mm_vision_select_layer: 22 is not from -3 to -1"),
    (LLAVA | {"mm_vision_select_layer": -4}, "mm_vision_select_layer: -4 is not from -3 to -1"),
    (LLAVA | {"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature: 'cls_patch' is not supported"),
    (LLAVA | {"drop_vision_last_layer": True}, "drop_vision_last_layer: True is not supported; it must be False"),
    (CLIP | {"num_channels": 1}, "num_channels: 1 is not supported; it must be 3"),
    (V2 | {"feature_scale_mask": "7"}, "feature_scale_mask: '7' is not a whole number"),
    (V2 | {"feature_scale_mask": 99}, "feature_scale_mask: "),
]


@pytest.mark.parametrize(("config", "message"), WRONG, ids=[message[:50] for _, message in WRONG])
def test_a_value_that_no_model_can_have(config, message, tmp_path):
    with pytest.raises(ConvertError, match=message) as error:
        read_checkpoint(_checkpoint(tmp_path, config))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
