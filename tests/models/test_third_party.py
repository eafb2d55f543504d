"""A family of somebody else's: by ten lines of a README, and by an installed distribution with an entry point."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

import sink_patch
from sink_patch import AdapterMismatchError, SinkCache
from tests.support.oracle import worst_error
from tests.support.tiny import tokens
from tests.support.wave import WaveConfig, WaveForCausalLM

ROOT = Path(__file__).parent.parent.parent
STEPS = [7, *[1] * 30, 9, 20, 1, 1]


def wave() -> WaveForCausalLM:
    torch.manual_seed(0)
    small = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = WaveConfig(**small, num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2)
    return WaveForCausalLM(config).eval()


def readme_snippet() -> str:
    return re.search(
        r"^```python\n(import sink_patch\n\n\n@sink_patch\.register_family.*?)^```",
        (ROOT / "sink_patch" / "models" / "README.md").read_text(),
        re.M | re.S,
    ).group(1)


def test_the_readmes_ten_lines_serve_a_model_that_is_not_in_transformers():
    assert len(readme_snippet().splitlines()) <= 10
    exec(readme_snippet(), {})
    assert worst_error(wave(), tokens(sum(STEPS)), STEPS, 12, 3) < 1e-5
    assert "family   wave" in str(sink_patch.inspect(wave()))


def test_the_probe_refutes_a_wrong_one():
    sink_patch.register_family("wave")(sink_patch.rope())
    with pytest.raises(AdapterMismatchError, match="family 'wave'.*layer 0 its keys"):
        SinkCache(model=wave())


def test_without_a_family_the_probe_finds_the_direction_itself():
    assert "reversed" in str(sink_patch.inspect(wave(), 12, 3))
    assert worst_error(wave(), tokens(sum(STEPS)), STEPS, 12, 3) < 1e-5


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which pip has installed a wheel with two entry points, one of them broken."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = folder / "their_package-1.0-py3-none-any.whl"
    info = "their_package-1.0.dist-info"
    files = {
        "their_module.py": readme_snippet().replace("def wave", "def FAMILY"),
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[sink_patch.families]\nwave = their_module:FAMILY\nbroken = their_module:NONE\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True)
    return target


@pytest.mark.slow
def test_an_installed_distribution_brings_its_family_and_a_broken_one_is_named(site):
    code = """
        import sys, warnings
        sys.path[:0] = sys.argv[1:]
        import sink_patch
        from tests.models.test_third_party import wave
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = sink_patch.inspect(wave())
        assert report.family == "wave", report
        named = [str(one.message) for one in caught if issubclass(one.category, sink_patch.SinkPatchWarning)]
        assert len(named) == 1 and "'broken' of their-package" in named[0], named
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(site), str(ROOT)], check=True)
