"""An image among the sinks: ten windows of text later, a question about it is answered as if it stood just before."""

from __future__ import annotations

import pytest
import torch

from sink_patch import SinkCache
from sink_patch.streaming.bound import streams_of
from tests.models.test_media import streaming
from tests.models.test_media_coordinates import places_of
from tests.support import media
from tests.support.media.oracle import embedded, fresh, visible
from tests.support.oracle import relative_error
from tests.support.replay import cache_name
from tests.support.tiny import tokens

W, TEXT, QUESTION = 32, 320, 4
SINKS = {"llava": 20, "qwen2_vl": 13}  # the text before the image, the image, and a token behind it


@pytest.mark.parametrize("model_type", SINKS)
@torch.no_grad()
def test_a_question_ten_windows_later_sees_the_image(model_type):
    model, sinks = media.build(model_type, ("full_attention",), max_position_embeddings=96), SINKS[model_type]
    streaming(model)
    name, text = cache_name(model), tokens(TEXT + QUESTION) % 80
    answers = []
    for seed in (0, 5):
        given, cache = media.prompt(model, [[2, "image", 2]]), SinkCache(W, sinks, model=model)
        given |= media.images(model, 1, seed)
        model(**given, **{name: cache})
        for piece in text.split([*[W - sinks] * (TEXT // (W - sinks)), TEXT % (W - sinks), QUESTION], dim=1):
            if piece.shape[1]:
                answer = model(piece, **{name: cache}).logits[:, -1]
        whole, seen = embedded(model, given, text), given["input_ids"].shape[1] + TEXT
        kept = visible(seen, QUESTION, W, sinks)
        placed = {}
        if getattr(whole.get("position_ids"), "ndim", 0) == 3:
            places = places_of(whole, torch.cat((given["input_ids"], text), dim=1))
            placed["position_ids"] = places.of(kept, sinks)[:, None]
        assert relative_error(answer, fresh(model, whole["inputs_embeds"][:, kept], **placed)) < 1e-5
        assert streams_of(cache).rows[0].base  # the clock was set back on the way
        answers.append(answer)
    assert relative_error(*answers) > 1e-2  # another image, another answer
