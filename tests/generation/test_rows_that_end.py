"""Rows of a batch that end at different times and go on in the next turn: each equals the row alone.

`generate` feeds padding to rows that have ended until all have; the next turn takes it back.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sink_patch import CacheStateError, HistoryMismatchError, SinkCache, UnsupportedModelError
from tests.support import zoo
from tests.support.known_gaps import skip_if_model_is_newer
from tests.support.oracle import relative_error, visible_tokens
from tests.support.tiny import tiny, tokens

EOS, PAD = 95, 96
LENGTHS = (6, 9, 4)  # of prompts
ENDS = ((3, 12, 7), (10, 2, 10), (1, 5, 8), (4, 4, 4))  # tokens of the answers of each turn, by row
W, S = 100, 4
TOLERANCE = 1e-5


class Ends(LogitsProcessor):
    """Each row ends after so many tokens, and not before; neither is any padding."""

    def __init__(self, prompt: int, ends):
        self.prompt, self.ends = prompt, ends

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, [EOS, PAD]] = -torch.inf
        for row, end in enumerate(self.ends):
            if input_ids.shape[1] - self.prompt == end - 1:
                scores[row] = -torch.inf
                scores[row, EOS] = 0
        return scores


def answer(model, ids, mask, ends, cache, *, eos=EOS, pad=PAD, **settings):
    """A turn; returns all ids and raw logits [rows, steps, vocab]."""
    asked = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 20}
    asked |= {"eos_token_id": eos, "pad_token_id": pad, "attention_mask": mask, "past_key_values": cache}
    processor = LogitsProcessorList([Ends(ids.shape[1], ends)])
    out = model.generate(ids, logits_processor=processor, **{**asked, **settings})
    return out.sequences, torch.stack(out.logits, dim=1)


def messages(turn: int):
    """What the users of all rows say, lists of ids."""
    said = tokens(max(LENGTHS), rows=len(LENGTHS), seed=turn) % 90 + 2
    return [one[:length].tolist() for one, length in zip(said, LENGTHS, strict=True)]


def padded(texts):
    longest = max(map(len, texts))
    ids = torch.tensor([[PAD] * (longest - len(text)) + text for text in texts])
    return ids, (ids != PAD).long()


def behind(sequences, texts, mask):
    """The history as it was returned, padding in the middle, with new texts behind it, padded to the left."""
    new, new_mask = padded(texts)
    # what a row was fed after its end is padding too
    old = (sequences != PAD).long()
    old[:, : mask.shape[1]] *= mask
    return torch.cat((sequences, new), dim=1), torch.cat((old, new_mask), dim=1)


def alone(model, window, turns, **settings):
    """All rows by themselves, each in a cache of its own: for each turn, logits of each row [1, steps, vocab]."""
    caches = [SinkCache(window, S) if window else None for _ in LENGTHS]
    texts, found = [[] for _ in LENGTHS], []
    for turn in range(turns):
        rows = []
        for row, said in enumerate(messages(turn)):
            ids = torch.tensor([texts[row] + said])
            end = (ENDS[turn][row],)
            sequences, logits = answer(model, ids, torch.ones_like(ids), end, caches[row], **settings)
            texts[row] = sequences[0].tolist()
            rows.append(logits)
        found.append(rows)
    return found, texts


def same_as_alone(logits, wanted):
    return max(relative_error(logits[row : row + 1, : one.shape[1]], one) for row, one in enumerate(wanted))


FORMS = ("as returned", "padded anew", "new tokens and the whole mask")


def together(model, window, turns, form="as returned", cache=None, **settings):
    """The rows as a batch: the worst error of each turn against the rows alone, and the ids of all rows."""
    wanted, texts_alone = alone(model, window, turns)
    cache, errors = SinkCache(window, S) if cache is None else cache, []
    ids, mask = padded(messages(0))
    sequences, texts = ids, messages(0)
    for turn in range(turns):
        if turn and form == "padded anew":
            said = messages(turn)
            ids, mask = padded([text + one for text, one in zip(texts, said, strict=True)])
        elif turn:
            ids, mask = behind(sequences, messages(turn), mask)
        read = cache.get_seq_length()
        given = ids[:, read:] if turn and form == FORMS[2] else ids
        found, logits = answer(model, given, mask, ENDS[turn], cache, **settings)
        sequences = torch.cat((ids, found[:, given.shape[1] :]), dim=1)
        errors.append(same_as_alone(logits, wanted[turn]))
        mask = torch.cat((mask, torch.ones_like(sequences[:, mask.shape[1] :])), dim=1)
        texts = [
            [token for token, real in zip(row.tolist(), one, strict=True) if real and token != PAD]
            for row, one in zip(sequences, mask.tolist(), strict=True)
        ]
    assert texts == texts_alone
    return errors


MODELS = {
    "llama": {},
    "cohere": {},
    "gptj": {},
    "falcon": {"alibi": True},
    "mistral": {"sliding_window": 90},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 90},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_each_row_equals_the_row_alone(model_type):
    skip_if_model_is_newer(model_type)
    model = tiny(model_type, layers=2, **MODELS[model_type])
    assert max(together(model, W, turns=4)) <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_in_whatever_form_the_history_is_given(form):
    assert max(together(tiny("llama", layers=2), W, turns=4, form=form)) <= TOLERANCE


def test_the_rows_alone_equal_the_default_cache():
    """Which is what they are compared with, below the window."""
    model = tiny("llama", layers=2)
    ours, theirs = (alone(model, window, turns=3)[0] for window in (W, None))
    for one, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert relative_error(one, other) <= TOLERANCE


def test_without_taking_back_it_would_be_another_text(monkeypatch):
    """The padding is seen else, and these models tell."""
    model = tiny("llama", layers=2)
    monkeypatch.setattr("sink_patch.generation.turns.Turn.take_back", lambda *_: None)
    with pytest.raises(Exception, match="calls other tokens of the past real"):
        together(model, W, turns=2)


def test_in_pieces():
    assert max(together(tiny("llama", layers=2), W, turns=4, prefill_chunk_size=16)) <= TOLERANCE


def test_past_the_window_where_what_leaves_it_is_kept():
    """The forwards of a row alone are others there, so that rows are compared with one layer's oracle."""
    model, window = tiny("llama", max_position_embeddings=64), 24
    cache = SinkCache(window, S, model=model)
    cache.activate_past_recording(20)
    ids = tokens(30, rows=3) % 90 + 2
    for turn, ends in enumerate(ENDS):
        mask, read = (ids != PAD).long(), cache.get_seq_length()
        sequences, logits = answer(model, ids, mask, ends, cache)
        for row in range(3):
            text, new = ids[row][mask[row] != 0][None], int(mask[row, read:].sum())
            with torch.no_grad():
                visible = visible_tokens(text, text.shape[1] - new, new, window, S)
                wanted = model(visible, use_cache=False).logits[:, -1]
            assert relative_error(logits[row : row + 1, 0], wanted) <= TOLERANCE
        ids = torch.cat((sequences, tokens(8, rows=3, seed=turn + 1) % 90 + 2), dim=1)


def first_turn(model, window, cache=None):
    ids, mask = padded(messages(0))
    cache = SinkCache(window, S) if cache is None else cache
    sequences, _ = answer(model, ids, mask, ENDS[0], cache)
    return cache, *behind(sequences, messages(1), mask)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_where_older_tokens_are_gone_it_is_refused(model_type):
    """In some layers alone it is enough."""
    local = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    model = tiny(model_type, layers=2, **(local if model_type == "gemma3_text" else {}))
    cache, ids, mask = first_turn(model, 12 if model_type == "llama" else W)
    read = cache.get_seq_length()
    for given in (ids, ids[:, read:]):
        before = copy.deepcopy(cache)
        with pytest.raises(CacheStateError, match=r"newest 8 tokens that row 0 .* cannot be taken back"):
            answer(model, given, mask, ENDS[1], cache)
        assert cache.get_seq_length() == read
        token = tokens(1, rows=3)
        with torch.no_grad():
            found, wanted = (model(token, past_key_values=one).logits for one in (cache.clone(), before))
        assert torch.equal(found, wanted)


def test_states_cannot_be_taken_back():
    skip_if_model_is_newer("lfm2")
    model = zoo.build("lfm2")
    try:
        SinkCache(W, S, model=model)
    except UnsupportedModelError:
        pytest.skip("models with states are refused in this version")
    cache, ids, mask = first_turn(model, W)
    with pytest.raises(CacheStateError, match="recurrent states"):
        answer(model, ids, mask, ENDS[1], cache)


def test_the_padding_may_be_the_token_that_ends_a_row():
    """Then a mask made of it hides that token too, and so it is taken back with the padding."""
    model = tiny("llama", layers=2)
    ids, mask = padded(messages(0))
    cache = SinkCache(W, S)
    sequences, _ = answer(model, ids, mask, ENDS[0], cache, pad=EOS)
    new, new_mask = padded(messages(1))
    mask = torch.cat((mask, (sequences[:, ids.shape[1] :] != EOS).long(), new_mask), dim=1)
    history = torch.cat((sequences, new), dim=1)
    found, logits = answer(model, history, mask, ENDS[1], cache, pad=EOS)
    wanted, logits_wanted = answer(model, history, mask, ENDS[1], None, pad=EOS)
    assert torch.equal(found, wanted)
    assert relative_error(logits[:, 0], logits_wanted[:, 0]) <= TOLERANCE


def test_another_text_in_one_row_is_still_refused():
    model = tiny("llama", layers=2)
    cache, ids, mask = first_turn(model, W)
    ids[0, 5] = (ids[0, 5] + 1) % 90 + 2
    with pytest.raises(HistoryMismatchError, match="Row 0 .* from token 2 on"):
        answer(model, ids, mask, ENDS[1], cache)
