"""Recurrent and convolution states cannot be taken back: a copy from before the answer holds them."""

from __future__ import annotations

import pytest
import torch

import sink_patch
from tests.kept.talk import counted
from tests.support import zoo
from tests.support.tiny import tokens

MODELS = ["bamba", "falcon_h1", "jamba", "lfm2", "mamba", "mamba2", "qwen3_next"]
ASKED = {"max_new_tokens": 4, "do_sample": False}
SINK = {"cache_implementation": "sink", "window_length": 100, "num_sink_tokens": 3, "keep_streams": 4}


@pytest.mark.parametrize("model_type", MODELS)
def test_states_go_on(model_type):
    """Within the window the default cache, over the whole text from its start, says the same."""
    model = zoo.build(model_type)
    text = model.generate(tokens(30), **ASKED, **SINK)
    if sink_patch.families()[model_type].whole_prompts:
        assert len(sink_patch.kept_streams) == 0, "it cannot go on with many tokens at once"
        return
    held = sink_patch.kept_streams.nbytes
    longer, branch = (torch.cat((text[:, :end], tokens(9, seed=end)), dim=1) for end in (34, 20))
    with counted(model) as forwards:
        for prompt, known in ((longer, 33), (branch, 14)):
            wanted = model.generate(prompt, **ASKED)
            sink_patch.kept_streams.clear()
            model.generate(tokens(30), **ASKED, **SINK)
            assert sink_patch.kept_streams.nbytes == held > 0
            forwards.clear()
            assert torch.equal(model.generate(prompt, **ASKED, **SINK), wanted)
            assert sum(forwards) == prompt.shape[1] - known + 3
