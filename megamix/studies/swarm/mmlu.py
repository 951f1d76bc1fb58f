"""MMLU's four categories, as means over its 57 subjects weighted by their numbers of test questions.

A swarm of Olmix has a metric ``mmlu_SUBJECT:rc::olmes`` for each subject, and Olmix fits the four means in their place.

Source of subjects, categories and numbers: Hendrycks et al., "Measuring Massive Multitask Language Understanding",
arXiv 2009.03300, and its test set of 14,042 questions.
"""

from __future__ import annotations

from collections.abc import Sequence

from megamix.core.errors import InputError
from megamix.core.text import listed

Means = dict[str, dict[str, float]]

QUESTIONS = {
    "stem": {
        "abstract_algebra": 100, "astronomy": 152, "college_biology": 144, "college_chemistry": 100,
        "college_computer_science": 100, "college_mathematics": 100, "college_physics": 102, "computer_security": 100,
        "conceptual_physics": 235, "electrical_engineering": 145, "elementary_mathematics": 378,
        "high_school_biology": 310, "high_school_chemistry": 203, "high_school_computer_science": 100,
        "high_school_mathematics": 270, "high_school_physics": 151, "high_school_statistics": 216,
        "machine_learning": 112,
    },
    "other": {
        "anatomy": 135, "business_ethics": 100, "clinical_knowledge": 265, "college_medicine": 173, "global_facts": 100,
        "human_aging": 223, "management": 103, "marketing": 234, "medical_genetics": 100, "miscellaneous": 783,
        "nutrition": 306, "professional_accounting": 282, "professional_medicine": 272, "virology": 166,
    },
    "social_sciences": {
        "econometrics": 114, "high_school_geography": 198, "high_school_government_and_politics": 193,
        "high_school_macroeconomics": 390, "high_school_microeconomics": 238, "high_school_psychology": 545,
        "human_sexuality": 131, "professional_psychology": 612, "public_relations": 110, "security_studies": 245,
        "sociology": 201, "us_foreign_policy": 100,
    },
    "humanities": {
        "formal_logic": 126, "high_school_european_history": 165, "high_school_us_history": 204,
        "high_school_world_history": 237, "international_law": 121, "jurisprudence": 108, "logical_fallacies": 163,
        "moral_disputes": 346, "moral_scenarios": 895, "philosophy": 311, "prehistory": 324, "professional_law": 1534,
        "world_religions": 171,
    },
}  # fmt: skip
"""Test questions by category and subject."""


def mmlu_means(columns: Sequence[str], source: str) -> Means:
    """The means that take the place of MMLU's subjects among the metrics of a swarm of Olmix; none where it has no
    subjects, or has the categories already.

    Raises:
        InputError: some of the subjects are missing.
    """
    means: Means = {
        f"mmlu_{category}": {f"mmlu_{subject}:rc::olmes": float(number) for subject, number in subjects.items()}
        for category, subjects in QUESTIONS.items()
    }
    wanted = [name for subjects in means.values() for name in subjects]
    missing = [name for name in wanted if name not in columns]
    if len(missing) == len(wanted) or any("mmlu_stem" in name for name in columns):
        return {}
    if missing:
        raise InputError(
            f"{source} has {len(wanted) - len(missing)} of MMLU's {len(wanted)} subjects, which Olmix takes together as four"
            f" means; {listed(missing)} are missing. Collect them, or take the others out of the file."
        )
    return means
