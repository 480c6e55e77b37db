"""Names of tasks and presets, for the command line, which must not import JAX to print its help."""

BENCHMARKS = (
    "textvqa",
    "vqav2",
    "vizwiz",
    "docvqa",
    "infovqa",
    "chartqa",
    "gqa",
    "scienceqa",
    "pope",
    "mme",
    "mmbench",
    "mmmu",
    "mmstar",
    "ai2d",
    "ocrbench",
    "refcoco",
)
TASKS = ("digit_pages", *BENCHMARKS)
PRESETS = ("plain", "v1", "v2", "v4")
