"""A manager of continuous batching, driven batch by batch in the thread of the test, and what `generate` says."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from sink_patch.compat import installed_shim
from tests.support.tiny import tokens

needs_batching = pytest.mark.skipif(not installed_shim().batching, reason="its paged cache takes no sinks")


@dataclass
class Asked:
    """One request: the ids of its prompt, and how many tokens are to follow."""

    prompt: list[int]
    new: int


def asked(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[Asked]:
    """Requests of random tokens, from (tokens of the prompt, new tokens)."""
    return [Asked(tokens(one, seed=100 * seed + i)[0].tolist(), new) for i, (one, new) in enumerate(lengths)]


def config(window_length: int, num_sink_tokens: int, **entries: Any) -> GenerationConfig:
    """A generation config that asks for sinks."""
    made = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=20, **entries)
    made.cache_implementation = "sink"
    made.cache_config = {"window_length": window_length, "num_sink_tokens": num_sink_tokens}
    return made


def batching(**entries: Any) -> Any:
    """A config of the manager, with little memory."""
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(
        **{"page_size": 8, "num_blocks": 60, "max_batch_tokens": 256, "return_logprobs": True, **entries}
    )


@dataclass
class Driven:
    """A manager that runs no thread.

    `most` is the largest number of blocks that one request had in one allocator, `beside` of requests in one batch,
    `read` the tokens that the model has read of each request.
    """

    manager: Any
    processor: Any
    done: dict[str, Any] = field(default_factory=dict)
    most: int = 0
    beside: int = 0
    read: Counter[str] = field(default_factory=Counter)

    def add(self, one: Asked, **others: Any) -> str:
        return self.manager.add_request(one.prompt, max_new_tokens=one.new, **others)

    def step(self) -> bool:
        """One batch; returns whether there was one."""
        is_any: bool = self.processor.prepare_next_batch()
        if is_any:
            for allocator in self.processor.cache.cache_allocators.values():
                self.most = max([self.most, *map(len, allocator.block_table.values())])
            batch = self.processor.inputs_and_outputs.requests_in_batch
            self.beside = max(self.beside, len(batch))
            self.read.update({one.state.request_id: one.query_length for one in batch})
            self.manager._generation_step()
            self.processor.update_batch()
        queue = self.manager.output_router.output_queue
        while not queue.empty():
            if (result := queue.get()).is_finished():
                self.done[result.request_id] = result
        return is_any

    def run(self, each: Callable[[int], None] = lambda number: None) -> dict[str, Any]:
        """All batches until nothing is left; `each` is called before each of them."""
        number = 0
        while (each(number), self.step())[1]:
            number += 1
            assert number < 10_000, "it does not come to an end"
        return self.done

    @property
    def is_idle(self) -> bool:
        """Whether no request has come that is not done."""
        return self.manager.input_queue.empty() and not self.processor.has_pending_requests()

    @property
    def free(self) -> float:
        """How much of the cache is free, from 0 to 1."""
        share: float = self.processor.cache.compute_free_capacity()
        return share


@contextlib.contextmanager
def driven(model: Any, generation_config: Any, batching_config: Any) -> Iterator[Driven]:
    """A manager of a model, whose attention is as before in the end."""
    before = model.config._attn_implementation
    with torch.no_grad():
        manager = model.init_continuous_batching(
            generation_config=generation_config, continuous_batching_config=batching_config
        )
        try:
            manager.batch_processor = manager._create_batch_processor()
            yield Driven(manager, manager.batch_processor)
        finally:
            model.set_attn_implementation(before)


def served(model: Any, requests: Sequence[Asked], generation_config: Any, batching_config: Any) -> list[Any]:
    """What the manager gives for requests that come at once."""
    with driven(model, generation_config, batching_config) as manager:
        names = [manager.add(one) for one in requests]
        manager.run()
        assert manager.free == 1.0
        return [manager.done[name] for name in names]


def generated(model: Any, one: Asked, generation_config: Any) -> tuple[list[int], torch.Tensor]:
    """The tokens that `generate` gives for a request, and their log-probabilities [tokens]."""
    asked_for = copy.deepcopy(generation_config)
    asked_for.update(max_new_tokens=one.new, return_dict_in_generate=True, output_logits=True, eos_token_id=None)
    out = model.generate(torch.tensor([one.prompt]), generation_config=asked_for)
    ids = out.sequences[0, len(one.prompt) :].tolist()
    logits = torch.stack(out.logits)[:, 0].float()  # [tokens, vocabulary]
    return ids, logits.log_softmax(-1)[range(len(ids)), ids]


def check(model: Any, one: Asked, result: Any, generation_config: Any, within: float = 1e-4) -> float:
    """Whether a result is what `generate` gives for the request alone; how far log-probabilities are off at most."""
    ids, scores = generated(model, one, generation_config)
    assert result.error is None
    assert result.generated_tokens == ids
    off = (torch.tensor(result.logprobs) - scores).abs().max().item()
    assert off < within
    return off
