"""Which tests run when: `unit` in a minute, the default in five, `nightly` the rest.

A test belongs to the default unless it carries the mark `nightly`. `conftest.py` sets
that mark and the mark `unit` when the tests are collected, by three rules.

- `@pytest.mark.nightly` on a test or a file: all of it runs at night.
- `@by_default()` on a parametrised test: a few cases run by default, the others at
  night.
- `UNIT` names the files, and single tests of files, that are pure functions.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent

# File below `tests/` -> the tests in it that are pure functions. `()`: all of them.
UNIT: dict[str, tuple[str, ...]] = {
    "accidents/test_run_files.py": (
        "test_paths_that_are_no_file",
        "test_values_that_yaml_1_1_reads_as_something_else_are_text",
        "test_numbers_and_words_are_what_they_look_like",
        "test_sections_that_are_none",
        "test_what_is_written_is_read_back",
        "test_lora_targets_that_match_nothing",
        "test_ranges",
        "test_values_in_messages_are_short",
        "test_not_yaml_is_told_apart_from_bad_values",
    ),
    "accidents/test_text_files.py": (
        "test_json_that_is_none_is_one_short_reason",
        "test_brackets_within_texts_are_no_nesting",
    ),
    "data/test_schema.py": (),
    "data/test_transforms.py": (),
    "evaluation/test_statistics.py": (),
    "guidance/test_negative_guidance.py": ("test_golden_values",),
    "likelihood/test_errors.py": (),
    "likelihood/test_schedules.py": (),
    "likelihood/test_transitions.py": (),
    "methods/test_d3po.py": (
        "test_golden_losses",
        "test_golden_log_probability_and_loss_from_it",
        "test_gradients",
        "test_pareto_preferences",
    ),
    "methods/test_dcpo_npo.py": ("test_dcpo_golden_values", "test_inverted_preferences"),
    "methods/test_diffusion_dpo.py": (),
    "methods/test_hooks.py": (),
    "methods/test_mapo.py": (),
    "methods/test_papers.py": (),
    "methods/test_rankdpo.py": (
        "test_golden_value",
        "test_two_images_are_a_weighted_pair",
        "test_policy_equal_to_the_reference_gives_log_two_per_weight",
        "test_options",
        "test_order_and_padding_do_not_matter",
        "test_ties_drop_out_and_share_their_rank",
        "test_gradients",
        "test_phi_from_scores",
        "test_win_rates_over_columns_of_scorers",
        "test_rows_that_hold_no_ranking",
        "test_mistakes",
    ),
    "methods/test_self_npo.py": (
        "test_golden_values",
        "test_gradient_is_the_formulas",
        "test_the_renoised_marginal_is_the_schedules_own",
        "test_grids_and_later_times",
    ),
    "methods/test_seppo.py": (
        "test_golden_values",
        "test_invariants",
        "test_gradients_and_the_detached_anchor",
    ),
    "methods/test_spo.py": ("test_the_pair_of_a_step",),
    "rewards/test_adapters.py": (),
    "rewards/test_cache.py": (
        "test_keys_follow_the_content",
        "test_a_changed_pixel_changes_the_digest",
        "test_mode_size_palette_and_transparency_are_part_of_the_digest",
        "test_every_field_is_part_of_the_key",
        "test_metadata_counts_in_full_and_in_any_order",
    ),
    "rewards/test_ensemble.py": (),
    "rewards/test_geneval.py": (
        "test_all_six_tags_are_covered",
        "test_positions_have_a_dead_zone",
        "test_every_demand_has_one_credit_whatever_fails_first",
    ),
    "rewards/test_panel.py": (),
    "rewards/test_vlm_judge.py": (
        "test_scores_are_read_from_replies",
        "test_yes_no_probabilities",
    ),
    "shapes/test_world.py": (),
    "steering/test_lineage.py": (),
    "steering/test_masked_toy.py": (
        "test_the_enumeration_gives_the_known_numbers",
        "test_the_weighted_histogram_is_the_tilted_law",
        "test_more_draws_and_the_soft_aggregate_lower_the_variance",
        "test_weights_dropped_must_fail",
        "test_guided_proposals_are_unbiased",
        "test_a_guided_proposal_without_its_ratio_must_fail",
        "test_uniform_diffusion_is_unbiased",
        "test_corrector_sweeps_are_part_of_the_sampler",
    ),
    "steering/test_smc.py": (),
    "steering/test_toy_mixture.py": ("test_closed_form",),
    "test_configs.py": (
        "test_every_run_file_parses_and_round_trips",
        "test_every_reward_file_parses_without_loading_weights",
        "test_every_field_is_documented",
        "test_lossless_readings",
        "test_lossy_readings_are_refused_with_the_path",
        "test_yaml_numbers_of_either_spelling_are_equal",
        "test_overrides_reach_and_create_sections",
        "test_unknown_keys_suggest_the_nearest",
        "test_files_that_are_no_run_files",
    ),
    "test_tiers.py": (),
    "training/test_loop.py": (
        "test_row_order_is_one_permutation_per_epoch",
        "test_row_order_keeps_buckets_apart",
        "test_positions_of_all_processes_are_those_of_one",
        "test_seeds_of_rows_epochs_and_purposes_differ",
        "test_metric_window_averages_what_applies",
        "test_pair_metrics_by_third",
        "test_divergence_guard_speaks_once_per_episode",
        "test_beta_message_gives_the_common_unit",
    ),
}


def by_default(keep: Callable[..., bool] | None = None, *, values: int | None = None) -> Any:
    """Mark a parametrised test: a few of its cases run by default, the others at night.

    Args:
        keep: Takes parameters of a case by name and says whether the case runs by
            default. Without it, a case does if at most one of its parameters differs
            from the first value in its list. So each value is met, but not each
            combination.
        values: Of each parameter, only so many first values run by default.

    Example:
        >>> @by_default()
        ... @pytest.mark.parametrize("method", METHODS)
        ... @pytest.mark.parametrize("family", FAMILIES)
        ... def test_steps(method, family): ...

        Every method meets the first family, and every family the first method.
    """
    return pytest.mark.by_default(keep=keep, values=values)


def mark_tiers(items: list[pytest.Item]) -> None:
    """Set the marks `nightly` and `unit` on the tests that were collected."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        for mark in cases[0].iter_markers("by_default"):
            for case in left_for_the_night(cases, **mark.kwargs):
                case.add_marker(pytest.mark.nightly)
    for item in items:
        if item.get_closest_marker("nightly") is None and is_unit(item):
            item.add_marker(pytest.mark.unit)


def left_for_the_night(
    cases: list[pytest.Item], keep: Callable[..., bool] | None, values: int | None
) -> list[pytest.Item]:
    """The cases of one test that its mark `by_default` does not keep."""
    if keep is not None:
        names = inspect.signature(keep).parameters
        return [c for c in cases if not keep(**{name: c.callspec.params[name] for name in names})]
    places = [parameter_places(cases, names) for names in parameter_names(cases[0])]
    left = []
    for case, *place in zip(cases, *places, strict=True):
        changed = [p for p in place if p > 0]
        if len(changed) > 1 or (values is not None and max(place) >= values):
            left.append(case)
    return left


def parameter_names(case: pytest.Item) -> list[tuple[str, ...]]:
    """The names that each `parametrize` of a test gives values to."""
    lists = [mark.args[0] for mark in case.iter_markers("parametrize")]
    return [
        tuple(n.strip() for n in names.split(",")) if isinstance(names, str) else tuple(names)
        for names in lists
    ]


def parameter_places(cases: list[pytest.Item], names: tuple[str, ...]) -> list[int]:
    """The place of each case's values among the different ones of all cases, from 0."""
    seen: dict[tuple[int, ...], int] = {}
    found = [tuple(id(case.callspec.params[name]) for name in names) for case in cases]
    return [seen.setdefault(values, len(seen)) for values in found]


def split_off(items: list[pytest.Item], part: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Split tests into those of one part and the rest.

    Args:
        items: The tests, of any tier.
        part: `K/N`, the K-th of N parts, K from 1. The name of a test says in which
            part it is, so that new tests leave the others where they are.

    Raises:
        UsageError: It is no such part.
    """
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise pytest.UsageError(f"--part: expected K/N with K from 1 to N, got {part!r}")
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        place = zlib.crc32(item.nodeid.encode("utf-8", "surrogatepass")) % int(count)
        (kept if place == int(number) - 1 else left).append(item)
    return kept, left


def is_unit(item: pytest.Item) -> bool:
    """Whether the table names this test."""
    names = UNIT.get(item.path.relative_to(TESTS).as_posix())
    return names is not None and (not names or item.originalname in names)


def holds_unit_tests(path: Path) -> bool:
    """Whether the table names this file, or a file in this folder."""
    name = path.relative_to(TESTS).as_posix()
    return name == "." or any(f"{file}/".startswith(f"{name}/") for file in UNIT)
