"""A manager that is stopped and started again, and `generate` while it is alive: no text is another one."""

from __future__ import annotations

import pytest
import torch

from sink_patch import UnsupportedGenerationError
from tests.batching.cases import model
from tests.batching.serving import asked, batching, config, needs_batching

pytestmark = needs_batching
W, S = 16, 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_session_attends_by_pages(attention):
    """The end of one sets back what the model attends by."""
    tested, (request,), wanted = model("llama", attention), asked([(10, 30)]), config(W, S)
    before = tested.config._attn_implementation
    ids = torch.tensor([request.prompt])
    text = tested.generate(ids, generation_config=config(W, S), max_new_tokens=30)[0, 10:].tolist()
    manager = tested.init_continuous_batching(wanted, batching())
    for _session in range(3):
        manager.start()
        manager.add_request(request.prompt, max_new_tokens=30)
        found = manager.get_result(timeout=60)
        manager.stop(block=True)
        assert found is not None
        assert found.generated_tokens == text
        assert tested.config._attn_implementation == before
        assert tested.generate(ids, generation_config=config(W, S), max_new_tokens=30)[0, 10:].tolist() == text


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generate_beside_it(attention):
    tested, ids = model("llama", attention), torch.arange(3, 13)[None]
    text = tested.generate(ids, generation_config=config(W, S), max_new_tokens=30)
    manager = tested.init_continuous_batching(config(W, S), batching())
    manager.start()
    try:
        if "paged" in tested.config._attn_implementation:
            with pytest.raises(UnsupportedGenerationError, match="serves continuous batching"):
                tested.generate(ids, generation_config=config(W, S), max_new_tokens=30)
        else:
            assert torch.equal(tested.generate(ids, generation_config=config(W, S), max_new_tokens=30), text)
    finally:
        manager.stop(block=True)
    assert torch.equal(tested.generate(ids, generation_config=config(W, S), max_new_tokens=30), text)
