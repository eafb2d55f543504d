"""Random talks with images: whole histories with all their images give what the new tokens and images alone give."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sink_patch import SinkCache
from sink_patch.models.families.media import MEDIA
from tests.models.test_media import ASKED, built, streaming, takes_images_later
from tests.support import media
from tests.support.oracle import relative_error
from tests.support.replay import cache_name

TYPES = ("token_type_ids", "mm_token_type_ids")
MARKS = slice(88, 96)  # ids that stand for images, or begin and end them: no answer has any
ANSWER = {**ASKED, "suppress_tokens": list(range(MARKS.start, MARKS.stop))}
Image = dict[str, Any]


def given(model, ids: torch.Tensor, images: list[Image], columns: int) -> dict[str, Any]:
    """The arguments of a forward or a call: ids [1, columns], their images, a mask over so many columns."""
    parts = {name: [image[name] for image in images] for name in (images[0] if images else ())}
    joined = {name: torch.cat(values, int(MEDIA[model.config.model_type].by_rows)) for name, values in parts.items()}
    types = {name: (ids == media.TOKEN).long() for name in TYPES if name in media.prompt(model, [[1]])}
    return {"input_ids": ids, "attention_mask": torch.ones(1, columns, dtype=torch.long), **joined, **types}


def logits_of_forwards(model, cache: SinkCache, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Of a greedy answer, by forwards alone."""
    name, found = cache_name(model), []
    for _ in range(ANSWER["max_new_tokens"]):
        found.append(model(**inputs, **{name: cache}).logits[:, -1])
        allowed = found[-1].clone()
        allowed[:, MARKS] = -torch.inf
        inputs = {"input_ids": allowed.argmax(dim=-1, keepdim=True)}
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model_type", ["llava", "idefics3", "qwen2_vl", "qwen3_vl", "gemma3"])
@torch.no_grad()
def test_a_talk_given_as_a_whole_is_that_of_its_new_parts(model_type, seed):
    """Of one to five turns, with up to two images each, the same ones again among them; windows of 14 to 60."""
    rng, model = random.Random(seed), built(model_type)
    sizes = rng.choice([14, 20, 30, 60]), rng.choice([0, 3, 7])
    whole, parts = streaming(model, *sizes), streaming(model, *sizes)
    if not takes_images_later(model):
        pytest.skip("images of later turns are refused by name with this transformers")
    pool, ids, all_images = [media.images(model, 1, seed=one) for one in range(2)], torch.zeros(1, 0).long(), []
    for turn in range(rng.randint(2, 5)):
        images = [rng.choice(pool) for _ in range(rng.choice([0, 1, 1, 2]))]
        words = [part for _ in images for part in ("image", rng.randint(1, 4))]
        said = media.prompt(model, [[rng.randint(1, 4), *words]], seed=10 * seed + turn)["input_ids"]
        ids, all_images = torch.cat((ids, said), dim=1), all_images + images
        out = model.generate(**given(model, ids, all_images, ids.shape[1]), **ANSWER, **{cache_name(model): whole})
        new = ids[:, parts.get_seq_length() :]
        wanted = logits_of_forwards(model, parts, given(model, new, images, ids.shape[1]))
        for one, other in zip(out.logits, wanted, strict=True):
            assert relative_error(one, other) < 1e-5
        ids = out.sequences
