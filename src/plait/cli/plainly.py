"""Every merging method in one plain sentence, and which to start with."""

from __future__ import annotations

from collections.abc import Sequence

# The first to try, of those that need the same: by docs/results, and what `plait merge` takes by itself.
FIRST = {
    "tsv": "the default",
    "iso_c": "the default for eight adapters of language models or more",
    "regmean": "first with statistics",
}

MERGES = {
    "task_arithmetic": "Adds the updates up, each times its weight.",
    "cat": "The same sum, under PEFT's name for it.",
    "linear": "The weighted mean of the updates.",
    "svd": "The sum, cut to the rank of one adapter.",
    "ties": "Keeps each adapter's largest entries and averages those that agree in sign.",
    "dare_linear": "Drops entries at random, enlarges the rest, and adds up.",
    "dare_ties": "Drops entries at random, then averages those that agree in sign.",
    "della": "Drops small entries more often than large ones, then averages those that agree in sign.",
    "breadcrumbs": "Drops the largest and the smallest entries, then adds up.",
    "sce": "Keeps the entries in which adapters differ most, weighs the adapters, and elects signs.",
    "sparse_arithmetic": "The entry-wise rules above, put together from switches.",
    "emr": "One common update and, with --per-task, a mask for each adapter.",
    "slerp": "Walks between two updates along an arc.",
    "multi_slerp": "A mean on the sphere, in one step, of any number.",
    "karcher": "The mean on the sphere, of any number.",
    "tsv": "Keeps every adapter's strongest directions and turns them out of each other's way.",
    "iso_c": "The sum with all its directions made equally strong.",
    "iso_cts": "Iso-C, with directions of single adapters that the sum misses.",
    "knots": "TIES in directions that all adapters share, instead of entries.",
    "core_space": "TIES, or another entry-wise rule, in the small space that the factors span.",
    "wudi": "Disturbs what each adapter's own rows read as little as it can.",
    "swudi": "The same for the strong directions; the weak ones are added up.",
    "regmean": "Keeps each adapter's outputs on its own task's inputs, by least squares.",
    "mats": "Keeps each adapter's predictions on its own task's inputs, by both sides of K-FAC.",
    "least_squares": "One weight for each adapter and module, by least squares on the tasks' inputs.",
    "ssr": "Sends each task's inputs to its own factors by a small matrix between them.",
    "fisher": "Averages entry by entry, by how much each adapter's predictions hang on an entry.",
    "regmean_pp": "RegMean whose inputs have gone through the merged layers below.",
    "featcal": "Fits layer after layer to the adapters' own outputs.",
    "adamerging": "Learns the weights by which predictions on the texts are surest.",
}


def needs_in_words(needs: Sequence[str]) -> str:
    """What a group of methods needs, as its heading says it."""
    if "texts" in needs:
        return "needs the base and a few texts of each task (--text TASK=FILE; base first)"
    if "fisher" in needs:
        return "needs Fisher files (plait stats fisher; --stats TASK=FILE)"
    if "output_gradients" in needs:
        return "needs two-sided statistics of each task (plait stats --output-gradients; --stats TASK=FILE)"
    return "needs statistics of each task (plait stats; --stats TASK=FILE)" if needs else "needs the adapters alone"
