"""What a version of transformers truly lacks, and so the tests that cannot be run on it: one row for each reason.

A test that fails where something is there, and we do not serve it, has no place here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pytest
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import CONFIG_MAPPING

from sink_patch.compat.table import NEWEST

INSTALLED = Version(Version(transformers.__version__).base_version)  # a release candidate is like its release


@dataclass(frozen=True)
class Lack:
    """Tests that are skipped on some versions.

    Args:
        versions: of transformers.
        tests: a test's node id, such as `tests/serving/test_serve.py::test_a*`, where `*` and `?` stand for anything; brackets
            are meant as they are. A path without `::` is a whole file, which is not even imported.
        reason: what the versions lack.
    """

    versions: SpecifierSet
    tests: str
    reason: str

    @property
    def is_file(self) -> bool:
        return "::" not in self.tests

    def holds(self, version: Version = INSTALLED) -> bool:
        return self.versions.contains(version)

    def names(self, nodeid: str) -> bool:
        return fnmatchcase(nodeid, self.tests.replace("[", "[[]"))


_NO_CONFIG = "a config with a cache_config and no cache_implementation is refused by transformers itself"
_CUT_MASKS = "masks of sliding windows are cut for whole prompts and for single tokens only"
_STATES_APART = "recurrent states are kept in caches of kinds of their own, and models that have them are refused"
_NO_GEMMA3N = "Gemma 3n is refused, as some of its layers read the cache by themselves"
_NO_MAMBA = "transformers fails with a Granite 4 that has attention alone, whatever the cache"
_ONE_MASK = "models take no mask for each kind of layer, which the naive cache gives them"


def _rows(versions: str, reason: str, *tests: str) -> tuple[Lack, ...]:
    return tuple(Lack(SpecifierSet(versions), f"tests/{test}", reason) for test in tests)


LACKS: tuple[Lack, ...] = (
    *_rows(">=4.53", "transformers has no SinkCache of its own any more", "cache/test_native_sink_cache.py"),
    *_rows("<4.53", "there is no continuous batching", "generation/test_generate.py::test_continuous_batching*"),
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
        "a model that trains with gradient checkpointing stores keys as ever",
        "generation/test_bad_input.py::test_gradient_checkpointing_stores_nothing",
    ),
    *_rows(
        "<5.5",
        _STATES_APART,
        "models/test_coverage.py::test_a_long_prompt_is_not_cut_where_states*",
        "models/test_states.py::*",
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
        "flex attention has masks for whole prompts alone",
        "serving/test_surroundings.py::test_flex_attention*",
    ),
    *_rows(
        ">=5.24",
        "PEFT does not know what a cache is called now",
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
    *_rows(
        "<4.56",
        _NO_GEMMA3N,
        "models/test_coverage.py::test_windows_are_kept*[gemma3n_text]",
        "cache/test_files.py::test_layers_that_share_the_keys*",
    ),
    *_rows(">=5.5,<5.7", _NO_MAMBA, "models/test_coverage.py::*the_oracle_in_each_kind_of_layer[granitemoehybrid]"),
    *_rows(
        "<4.57",
        "its methods have other parameters than those of the newest version, for which it is made to pass",
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
        "generation/test_compiled.py::*states]",
    ),
    *_rows(
        "<4.56",
        "flash attention sees one token more than a sliding window holds",
        "streaming/test_flash.py::*mistral*",
    ),
    *_rows(
        ">=4.54,<4.55",
        "flash attention fails in any loop of forwards (transformers 39814)",
        "streaming/test_flash.py::*",
    ),
    *_rows(
        ">=4.54,<4.56",
        "a model cannot make a cache of transformers' own inside one graph",
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
    ),
)


def here(version: Version = INSTALLED) -> Iterator[Lack]:
    """The rows for a version."""
    return (lack for lack in LACKS if lack.holds(version))


def is_newest(version: Version = INSTALLED) -> bool:
    """Whether it is the newest transformers that we know, or a newer one."""
    return version >= Version(NEWEST)


def skip_what_is_to_come(model_type: str) -> None:
    """Skip the running test where the installed transformers is not the newest, and does not have these models yet."""
    if model_type not in CONFIG_MAPPING and not is_newest():
        pytest.skip(f"transformers has no {model_type} yet")


def of(nodeid: str, version: Version = INSTALLED) -> str | None:
    """Why a test, or a file, cannot be run on a version; None where it can."""
    return next((lack.reason for lack in here(version) if lack.names(nodeid)), None)


class LackingFile(pytest.Module):
    """A file that is skipped before it is imported: what it imports may not be there."""

    def collect(self) -> list:
        pytest.skip(of(self.nodeid) or "", allow_module_level=True)
