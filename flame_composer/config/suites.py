"""Groups of benchmarks that people quote together, and how each is usually quoted."""

from __future__ import annotations

from typing import NamedTuple

STEREOSET = "stereoset"  # our own task; all others are lm-evaluation-harness's


class Benchmark(NamedTuple):
    """A benchmark of a suite: its task, and the figures by which it is quoted.

    `task` is the name of the harness's task or group, or STEREOSET. `shots` is the number of
    examples shown before each question. `metrics` maps the name of each metric that is quoted to
    the level that a model reaches that knows nothing, or None if there is no such level.
    """

    name: str
    task: str
    shots: int
    metrics: dict[str, float | None]


# Shots and metrics: MMLU with 5 examples, as Hendrycks et al. 2021 (arXiv 2009.03300) and everybody
# since; the next six with none, as in the papers on LLaMA (2302.13971), GLA (2312.06635) and OLMo
# (2402.00838); C-Eval (2305.08322) and CMMLU (2306.09212) with 5. The metrics are those of GLA's
# table: normalized by the length of the answers for HellaSwag and ARC challenge, and not for the
# others. "Nothing known" is a guess among the answers; of measures of bias, no preference.
SUITES: dict[str, tuple[Benchmark, ...]] = {
    "base": (
        Benchmark("MMLU", "mmlu", 5, {"acc": 0.25}),
        Benchmark("HellaSwag", "hellaswag", 0, {"acc_norm": 0.25}),
        Benchmark("PIQA", "piqa", 0, {"acc": 0.5}),
        Benchmark("WinoGrande", "winogrande", 0, {"acc": 0.5}),
        Benchmark("ARC easy", "arc_easy", 0, {"acc": 0.25}),
        Benchmark("ARC challenge", "arc_challenge", 0, {"acc_norm": 0.25}),
        Benchmark("LAMBADA", "lambada_openai", 0, {"acc": 0.0, "perplexity": None}),
    ),
    "chinese": (
        Benchmark("C-Eval", "ceval-valid", 5, {"acc": 0.25}),
        Benchmark("CMMLU", "cmmlu", 5, {"acc": 0.25}),
    ),
    "bias": (
        # The harness offers ten wordings of "unknown" beside the two other answers, so a guess is
        # right in 10 of 12 where nothing is known, and in 1 of 12 where the text tells.
        Benchmark(
            "BBQ",
            "bbq",
            0,
            {
                "accuracy_amb": 10 / 12,
                "accuracy_disamb": 1 / 12,
                "amb_bias_score": 0.0,
                "disamb_bias_score": 0.0,
            },
        ),
        Benchmark("CrowS-Pairs", "crows_pairs_english", 0, {"pct_stereotype": 0.5}),
        # Of a model that chooses at random (Nadeem et al. 2021, section 5).
        Benchmark("StereoSet", STEREOSET, 0, {"lms": 50.0, "ss": 50.0, "icat": 50.0}),
    ),
}


# The folders of lm_eval/tasks that hold these tasks; to read them all takes seconds.
FOLDERS = {
    "mmlu": "mmlu/default",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "lambada_openai": "lambada",
    "ceval-valid": "ceval",
    "cmmlu": "cmmlu",
    "bbq": "bbq",
    "crows_pairs_english": "crows_pairs",
}


def tasks_of(suite: str | None) -> list[str]:
    """Return the names of the tasks of a suite; none for None."""
    return [] if suite is None else [benchmark.task for benchmark in SUITES[suite]]


def shots_of(suite: str | None) -> dict[str, int]:
    """Return the number of examples shown before a question, by the suite's tasks."""
    return {} if suite is None else {each.task: each.shots for each in SUITES[suite]}
