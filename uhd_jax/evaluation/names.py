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
PRESETS = ("plain", "v1", "v2", "v4", "4.6", "4.6-thinking")
PROMPTS = ("llava", "minicpm", "minicpm_steps", "minicpm_4_6", "minicpm_4_6_steps", "bare")
