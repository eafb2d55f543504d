"""Switching on at import, with and without an import of ours, and switching it off; each in a fresh interpreter."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from sink_patch.compat import installed_shim
from tests.support.fresh import NO_ENTRY_POINT, STREAM, fresh

OFF = {"SINK_PATCH_AUTOLOAD": "0"}
SHOWS_OFF = """
from transformers import GenerationMixin
assert refused() and "sink" not in CHOICES() and ours() == [0, 0]
"""


def test_importing_sink_patch_is_light():
    fresh("""
        import sys
        before = set(sys.modules)
        import sink_patch
        heavy = {name.partition(".")[0] for name in set(sys.modules) - before}
        heavy -= {"sink_patch", "wrapt", *sys.stdlib_module_names}
        assert not heavy, heavy
    """)


@pytest.mark.parametrize(
    "first",
    [
        "import sink_patch, transformers",
        "import transformers.generation.utils, transformers.modeling_utils, sink_patch",
    ],
)
def test_importing_sink_patch_switches_it_on_whatever_was_imported_before(first):
    fresh(first, STREAM, **NO_ENTRY_POINT)


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        "from transformers import GenerationMixin",
        "from transformers import GenerationConfig",
    ],
)
def test_with_no_import_of_ours_torch_switches_it_on(first):
    fresh(first, STREAM)


PATCHED = sorted({method.module for method in installed_shim().methods})


@pytest.mark.parametrize("module", [name for name in PATCHED if not name.startswith("transformers.models.")])
def test_each_module_that_is_patched_may_be_the_first_to_be_imported(module):
    """Ours are imported in the middle of it then, and bring other modules of transformers that are patched."""
    if not importable(module):
        pytest.skip(f"{module} cannot be imported: it needs packages of a server, or is not there yet")
    fresh(f"import {module}", STREAM)


def importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def test_a_config_may_ask_for_the_sink_cache_before_torch_is_there():
    fresh("""
        import sys, sink_patch
        from transformers import GenerationConfig
        assert GenerationConfig(cache_implementation="sink").cache_implementation == "sink"
        assert "torch" not in sys.modules and sink_patch.is_patched()
    """)


def test_torchs_switch_keeps_it_off_until_patch_is_called():
    fresh(
        SHOWS_OFF,
        'import sys; assert "sink_patch" not in sys.modules, "it came along all the same"',
        "import sink_patch; sink_patch.patch()",
        STREAM,
        **NO_ENTRY_POINT,
    )


def test_our_switch_keeps_it_off_until_patch_is_called():
    fresh(
        SHOWS_OFF,
        "import sink_patch; assert not sink_patch.is_patched() and refused() and ours() == [0, 0]",
        "sink_patch.patch()",
        STREAM,
        **OFF,
    )


@pytest.mark.parametrize("first", ["", "import transformers"])
def test_patch_called_by_hand_before_transformers_is_loaded_holds_when_it_is(first):
    fresh(first, "import sink_patch; sink_patch.patch(); assert sink_patch.is_patched()", STREAM, **OFF)


@pytest.mark.parametrize("first", ["import torch", "import sink_patch"])
def test_a_broken_wrapt_costs_a_warning_and_no_import(first, tmp_path: Path):
    (tmp_path / "wrapt.py").write_text('raise RuntimeError("broken on purpose")')
    _still_works_without_us(first, tmp_path)


COLD = "from transformers import GenerationMixin"


@pytest.mark.parametrize(
    ("part", "first"),
    [("patching.switch", "import torch"), ("compat", COLD), ("generation.wrappers", COLD)],
)
def test_a_broken_part_of_ours_costs_a_warning_and_no_import(part, first, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(f"""
import sys

class Breaks:
    def find_spec(self, name, path=None, target=None):
        if name == "sink_patch.{part}":
            raise RuntimeError("broken on purpose")

sys.meta_path.insert(0, Breaks())
""")
    _still_works_without_us(first, tmp_path)


@pytest.mark.parametrize("first", ["import torch", COLD])
def test_a_complaint_breaks_no_import_even_where_warnings_are_errors(first, tmp_path: Path):
    """Nobody who only has sink_patch installed may lose transformers to it."""
    (tmp_path / "wrapt.py").write_text('raise RuntimeError("broken on purpose")')
    fresh(first, COLD, "assert refused()", path=[tmp_path])


def test_a_newer_transformers_breaks_no_import_even_where_warnings_are_errors():
    fresh(
        "import transformers; transformers.__version__ = '99.1'",
        "import torch, transformers.modeling_utils",
        COLD,
        "assert ours() == [1, 1] and not refused()",
    )


def _still_works_without_us(first: str, broken: Path) -> None:
    fresh(
        f"""
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            {first}
            import torch, transformers
            from transformers import GenerationMixin, LlamaForCausalLM
            assert refused() and "sink" not in CHOICES()
        told = [warning for warning in caught if "broken on purpose" in str(warning.message)]
        assert len(told) == 1 and issubclass(told[0].category, UserWarning), list(map(str, caught))
        assert "sink_patch" in str(told[0].message) or "transformers" in str(told[0].message), told[0]
        """,
        path=[broken],
    )
