"""Tests that cannot run on some versions of transformers or torch, because these versions lack a feature.

A test that fails because sink_patch does not support a feature that transformers has does not belong here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import CONFIG_MAPPING

from sink_patch.compat.table import NEWEST

INSTALLED = Version(Version(transformers.__version__).base_version)  # a release candidate counts as its release
TORCH = Version(Version(torch.__version__).base_version)


@dataclass(frozen=True)
class KnownGap:
    """Tests that are skipped on some versions.

    Args:
        versions: of transformers.
        tests: node ids of tests, such as `tests/serving/test_serve.py::test_a*`. `*` and `?` are wildcards; brackets
            have no special meaning. A path without `::` is a whole file, which is not imported.
        reason: what the versions lack.
        torch: versions of torch; the row is about both.
    """

    versions: SpecifierSet
    tests: str
    reason: str
    torch: SpecifierSet = field(default_factory=SpecifierSet)

    @property
    def is_file(self) -> bool:
        return "::" not in self.tests

    def applies_to(self, version: Version = INSTALLED, torch: Version = TORCH) -> bool:
        return self.versions.contains(version) and self.torch.contains(torch)

    def matches(self, nodeid: str) -> bool:
        return fnmatchcase(nodeid, self.tests.replace("[", "[[]"))


_NO_CONFIG = "transformers itself refuses a config with a cache_config and no cache_implementation"
_CUT_MASKS = "masks of sliding windows are cut only for whole prompts and for single tokens"
_STATES_APART = "recurrent states are stored in caches of other classes, and models that have them are refused"
_NO_GEMMA3N = "Gemma 3n is refused, because some of its layers read the cache directly"
_NO_MAMBA = "transformers fails with any cache for a Granite 4 that has attention layers alone"
_ONE_MASK = "models do not take one mask for each kind of layer, as the naive cache passes them"


def _rows(versions: str, reason: str, *tests: str, torch: str = "") -> tuple[KnownGap, ...]:
    return tuple(KnownGap(SpecifierSet(versions), f"tests/{test}", reason, SpecifierSet(torch)) for test in tests)


KNOWN_GAPS: tuple[KnownGap, ...] = (
    *_rows(">=4.53", "transformers has removed its own SinkCache", "cache/test_native_sink_cache.py"),
    *_rows(
        "<4.53",
        "there is no continuous batching",
        "generation/test_generate.py::test_continuous_batching*",
        "doors/test_continuous_batching.py",
    ),
    *_rows(
        "<4.53",
        "transformers fails to load a custom_generate from a directory",
        "doors/test_custom_generate.py::test_an_exported_directory_loads*",
    ),
    *_rows(
        "<4.54",
        _NO_CONFIG,
        "generation/test_generate.py::test_sizes_may_be_given_in_many_ways[an argument beside*",
        *(
            f"generation/test_bad_input.py::test_sizes_in_configs_are_never_passed_over[call{number}-*"
            for number in (0, 3, 4)
        ),
    ),
    *_rows(
        "<4.53",
        _CUT_MASKS,
        "generation/test_default_cache.py::test_logits_of_each_family*gemma2-in *chunk*",
        "generation/test_default_cache.py::test_logits_of_each_family*gemma3_text-in *chunk*",
        "generation/test_default_cache.py::test_logits_of_each_family*cohere2-in *chunk*",
    ),
    *_rows(
        "<4.53",
        "models store keys in training with gradient checkpointing, too",
        "generation/test_bad_input.py::test_gradient_checkpointing_stores_nothing",
    ),
    *_rows(
        "<5.5",
        _STATES_APART,
        "models/test_coverage.py::test_a_long_prompt_is_not_cut_where_states*",
        "models/test_states.py::*",
        "models/test_states_only.py::*",
        "kept/test_states.py::*",
    ),
    *_rows(
        "<5.5",
        _STATES_APART,
        "streaming/test_ragged.py::*qwen3_next*",
        "streaming/test_faults.py::*qwen3_next*",
    ),
    *_rows("<4.53", _CUT_MASKS, "streaming/test_ragged.py::test_padded_embeddings*[gemma3_text-in pieces]"),
    *_rows(
        "<4.53",
        "flex attention has masks for whole prompts only",
        "serving/test_surroundings.py::test_flex_attention*",
    ),
    *_rows(
        ">=5.24",
        "PEFT does not know the new name of the cache argument",
        "serving/test_surroundings.py::test_prompt_tuning*",
    ),
    *_rows(
        "<5.5",
        _STATES_APART,
        "cache/test_files.py::test_states*",
        "cache/test_files.py::test_what_it_does_not_know*",
        "cache/test_bad_files.py::*states*",
    ),
    *_rows("<4.53", _CUT_MASKS, "cache/test_files.py::test_it_goes_on_to_the_bit[gemma3_text*"),
    *_rows("<4.53", _CUT_MASKS, "kept/test_turns.py::*its_new_tokens_alone[gemma3_text]"),
    *_rows(
        "<4.56",
        _NO_GEMMA3N,
        "models/test_coverage.py::test_windows_are_kept*[gemma3n_text]",
        "cache/test_files.py::test_layers_that_share_the_keys*",
    ),
    *_rows(">=5.5,<5.7", _NO_MAMBA, "models/test_coverage.py::*the_oracle_in_each_kind_of_layer[granitemoehybrid]"),
    *_rows(
        "<4.57",
        "its methods have other parameters than the newest version, which the test pretends that it is",
        "patching/test_autoload.py::test_a_newer_transformers_breaks_no_import_even_where_warnings_are_errors",
        "patching/test_unsupported_transformers.py::test_a_version_is_complained_of_once_and_never_breaks_the_import[99.1-True]",
    ),
    *_rows(
        "<5.23",
        "transformers itself imports torch to make a GenerationConfig",
        "patching/test_autoload.py::test_a_config_may_ask_for_the_sink_cache_before_torch_is_there",
    ),
    *_rows(
        "<5.24",
        "COVERAGE.md is the table of the newest transformers",
        "models/test_coverage.py::test_the_counts_and*",
        "evaluate/test_cli.py::test_families_prints_the_table_of_the_repository",
    ),
    *_rows(
        ">=4.56",
        "contrastive search has moved to the Hub",
        "generation/test_bad_input.py::test_modes*[contrastive*",
    ),
    *_rows(">=4.57", "these beams have moved to the Hub", "generation/test_bad_input.py::test_modes*[group*"),
    *_rows(">=4.56", "this mode has moved to the Hub", "generation/test_bad_input.py::test_modes*[dola*"),
    *_rows(
        "<5.5",
        _STATES_APART,
        "generation/test_drafts.py::*with_states*",
        "generation/test_drafts.py::*cannot_take_tokens_back*",
        "generation/test_compiled.py::test_recurrent_states*",
        "generation/test_compiled.py::*keeps no keys]",
    ),
    *_rows(
        "<5.7",
        "states of this model start anew with each forward of several tokens",
        "generation/test_compiled.py::test_recurrent_states_in_a_graph*[second turn*",
    ),
    *_rows(
        "<4.56",
        "flash attention sees one token more than the sliding window",
        "streaming/test_flash.py::*mistral*",
        "streaming/test_flash.py::test_at_fixed_shapes_a_model_with_a_sliding_window*",
    ),
    *_rows(
        ">=4.54,<4.55",
        "flash attention fails in any loop of forwards (transformers 39814)",
        "streaming/test_flash.py::*",
    ),
    *_rows(
        ">=4.54,<4.56",
        "a model cannot create transformers' default cache inside one graph",
        "generation/test_compiled.py::test_a_graph_that_is_called_by_hand*",
    ),
    *_rows(
        ">=4.56,<5.3,!=5.0.*",
        "the experts of gpt_oss cannot be compiled in one graph",
        "generation/test_compiled.py::test_one_graph*[gpt_oss*",
    ),
    *_rows(
        "<4.53",
        _ONE_MASK,
        "streaming/test_rollback.py::*naive_cache*[gemma3*",
        "streaming/test_many_layers.py::*gemma3*",
        "streaming/test_many_layers.py::*cohere2*",
        "streaming/test_turns.py::*naive_cache*[gemma3*",
        "streaming/test_turns.py::*naive_cache*[cohere2*",
    ),
    *_rows(
        ">=5.0,<5.3",
        "Gemma 3n cannot hear: transformers reads an attribute of a tensor that it does not have",
        "models/test_media.py::test_several_layers_equal_a_naive_cache[gemma3n]",
    ),
    *_rows(
        "<4.56",
        "an image of Gemma 3 sees others that are near it",
        "models/test_media_both_ways.py::test_later_images_equal_a_naive_cache_with_written_masks[*gemma*]",
    ),
    *_rows(
        ">=5.3,<5.5",
        "the time of an image of Qwen2.5-VL is many times the position at which the image begins",
        "models/test_media_coordinates.py::test_several_layers_equal_a_naive_cache[qwen2_5_vl]",
        "models/test_media_pieces.py::test_*[qwen2_5_vl*]",
    ),
    *_rows(
        ">=5.13,<5.20",
        "transformers warns of an argument that it passes to itself",
        "models/test_media.py::test_several_layers_equal_a_naive_cache[vibevoice_asr]",
    ),
    *_rows(
        "<5.20",
        "its config does not make the config of its own text model",
        "models/test_media.py::test_several_layers_equal_a_naive_cache[granite4_vision]",
        "models/test_media_pieces.py::test_what_the_decoder_is_given*[granite4_vision]",
    ),
    *_rows(
        "<5.3",
        "there are no types of tokens: an image is known by the token before it, which must come in the same turn",
        "kept/test_images_told.py::test_types_that_say_more*[qwen2_vl]",
        "models/test_media_leaving.py::test_no_random_text*[qwen2_vl]",
        "models/test_media_leaving.py::test_text_behind_images*[qwen2_vl]",
    ),
    *_rows(
        ">=5.0,<5.18",
        "the first call of a pipeline changes the settings of the model, so that its stream is not kept",
        "kept/test_images_by_doors.py::test_a_pipeline*",
    ),
    *_rows(
        "<4.56",
        "its own vision tower fails",
        "models/test_media*::*[glm4v*",
    ),
    *_rows(
        "<4.54",
        "get_decoder() gives no module",
        "models/test_media.py::test_images_that_a_model_leaves_out*",
    ),
    *_rows(
        "<5.15",
        "states of this model start anew with each forward of several tokens",
        "models/test_media.py::test_several_layers_equal_a_naive_cache[lfm2_vl]",
    ),
    *_rows(
        ">=5.0",
        "this torch cannot trace the models of this transformers",
        "generation/test_compiled.py::*",
        torch="<2.7",
    ),
)


def gaps_of(version: Version = INSTALLED) -> Iterator[KnownGap]:
    """The rows that apply to a version."""
    return (gap for gap in KNOWN_GAPS if gap.applies_to(version))


def is_newest(version: Version = INSTALLED) -> bool:
    """Whether it is the newest supported transformers, or a newer one."""
    return version >= Version(NEWEST)


def skip_if_model_is_newer(model_type: str) -> None:
    """Skip the running test if the installed transformers is an older one that does not have this model yet."""
    if model_type not in CONFIG_MAPPING and not is_newest():
        pytest.skip(f"transformers has no {model_type} yet")


def reason_to_skip(nodeid: str, version: Version = INSTALLED) -> str | None:
    """Why a test, or a whole file, cannot run on a version; None: it can."""
    return next((gap.reason for gap in gaps_of(version) if gap.matches(nodeid)), None)


class SkippedFile(pytest.Module):
    """A test file that is skipped without being imported, because its imports may fail."""

    def collect(self) -> list:
        pytest.skip(reason_to_skip(self.nodeid) or "", allow_module_level=True)
