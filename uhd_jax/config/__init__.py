"""Typed configuration of a run.

A file in `configs/` returns an `ml_collections.ConfigDict`; `from_config_dict` turns it, once, into the frozen
dataclasses below. An unknown key, a wrong type or an impossible mix raises `ConfigError` naming the full key.
Everything behind the command line sees only the dataclasses, never a ConfigDict.
"""

from uhd_jax.config.build import from_config_dict, to_dict
from uhd_jax.config.checks import ConfigError
from uhd_jax.config.model import (
    COMPRESSORS,
    CONNECTORS,
    MODES,
    PYRAMID_CONNECTORS,
    QUERY_CONNECTORS,
    ChatConfig,
    CompressorConfig,
    ConnectorConfig,
    DecoderConfig,
    ImageLimits,
    ModelConfig,
    PreResizeConfig,
    PyramidConfig,
    SlicingConfig,
    TowerConfig,
    VideoConfig,
)
from uhd_jax.config.run import (
    PARTS,
    AugmentConfig,
    BucketConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    ReconstructionConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)

__all__ = [
    "AugmentConfig",
    "BucketConfig",
    "COMPRESSORS",
    "CONNECTORS",
    "ChatConfig",
    "CompressorConfig",
    "ConfigError",
    "ConnectorConfig",
    "DataConfig",
    "DecoderConfig",
    "ImageLimits",
    "MODES",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PARTS",
    "PYRAMID_CONNECTORS",
    "PreResizeConfig",
    "PyramidConfig",
    "QUERY_CONNECTORS",
    "ReconstructionConfig",
    "RunConfig",
    "SlicingConfig",
    "StageConfig",
    "TowerConfig",
    "TrainConfig",
    "VideoConfig",
    "from_config_dict",
    "to_dict",
]
