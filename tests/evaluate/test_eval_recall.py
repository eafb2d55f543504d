"""What is asked in streams, how answers are scored, and where attention lies: with tiny models and by hand."""

from __future__ import annotations

import json
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import sink_patch
from sink_patch import cli
from sink_patch.errors import SinkArgumentError
from sink_patch.evaluate.recall import asking
from sink_patch.evaluate.recall import figures as recall_figures
from sink_patch.evaluate.recall.scripts import chat, lines, questions, script, words
from sink_patch.evaluate.recall.sinks import attention, figures, run
from tests.support.measured import tiny_model as measured_model
from tests.support.tiny import FAMILIES, tiny

W, S = 60, 2
PLAN = lines.Plan(tokens=600, distances=(2, 4, 9, 30), every=3)
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
OTHER_WORDS = (
    "= . , : ? < > Now read them again OK You are a helpful assistant and keep list of words Zoe mayor Berne Hello ! "
    "user system end Question Answer What do bees make two"
)


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    known = dict.fromkeys([*words.WORDS, *words.NAMES, *words.JOBS, *words.CITIES, *OTHER_WORDS.split()])
    found = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<unk>", *known])}, "<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    settings = {"unk_token": "<unk>", "chat_template": TEMPLATE, "model_input_names": names, **options}
    return PreTrainedTokenizerFast(tokenizer_object=found, **settings)


TOKENIZER = tokenizer()


def tiny_model(layers: int = 1) -> LlamaForCausalLM:
    """With the vocabulary of this tokenizer, and no token that begins or ends a text."""
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return measured_model(layers, vocab_size=len(TOKENIZER), max_position_embeddings=512, **ends)


def stream_of(parts: list[script.Part]) -> list[int]:
    return [one for part in parts for one in part.ids]


# --- the stream of lines --------------------------------------------------------------------------------------------


def test_lines_do_not_give_answers_away() -> None:
    found = [line for line, _ in zip(lines.lines(3), range(900), strict=False)]
    assert len({line.key for line in found}) == len(found)
    apart = len(words.WORDS) * 3 // 4
    for number, line in enumerate(found):
        assert line.word not in {other.word for other in found[max(0, number - apart) : number]}
        before = {word for other in found[max(0, number - 28) : number] for word in other.key.split()}
        assert not set(line.key.split()) & before


def test_each_question_is_about_the_line_so_many_lines_back() -> None:
    parts = lines.parts(TOKENIZER, PLAN)
    text = [TOKENIZER.decode(part.ids).split() for part in parts]
    ids = stream_of(parts)
    assert len(ids) >= PLAN.tokens > len(ids) - len(parts[-1].ids)
    for number, part in enumerate(parts):
        asking_here = (number + 1) % PLAN.every == 0 and number > 6  # from the seventh line on
        due = [distance for distance in PLAN.distances if asking_here and distance <= number]
        assert [question.group for question in part.questions] == due
        for question in part.questions:
            *key, sign, word = text[number - question.group]
            assert question.fact is not None
            assert TOKENIZER.decode(ids[slice(*question.fact)]).split() == [*key, sign, word]
            *again, a, b, c, last = TOKENIZER.decode(question.prompt).split()
            assert [a, b, c, last] == [*key, sign]
            choices = [TOKENIZER.decode(choice) for choice in question.choices]
            assert choices[0] == word
            assert len(set(choices)) == lines.CHOICES
            near = {text[other][-1] for other in range(number + 1) if abs(other - number + question.group) <= 5}
            assert set(choices[1:]) <= near
            assert not set(choices) & set(again)  # neither the right answer nor a wrong one is read again
            assert again[:4] == ["Now", "read", "them", "again"]


def test_a_stream_in_which_nothing_would_be_asked_is_refused() -> None:
    with pytest.raises(SinkArgumentError, match="nothing is asked"):
        lines.parts(TOKENIZER, lines.Plan(tokens=50, distances=(100,)))
    for wrong in ({"every": 0}, {"distances": ()}, {"distances": (-1,)}, {"tokens": 0}):
        with pytest.raises(SinkArgumentError):
            lines.Plan(**{"tokens": 50, **wrong})  # type: ignore[arg-type]


def test_the_beginning_and_the_space_of_other_tokenizers() -> None:
    fake = type("Fake", (), {"bos_token_id": 1, "__call__": lambda _, text, **options: {"input_ids": [1, 7]}})()
    assert script.beginning(fake) == (1,)
    assert script.beginning(TOKENIZER) == ()
    piece = type("Piece", (), {"__call__": lambda _, text, **options: {"input_ids": [0, *map(ord, text)]}})()
    assert script.following(piece, "ab", "cd") == (ord("c"), ord("d"))  # without what it writes before any text


def seen(tokens: int, window: int, sinks: int) -> set[int]:
    """Indices that the newest of so many tokens sees."""
    return set(range(tokens)) if tokens <= window else {*range(sinks), *range(tokens - window + sinks, tokens)}


def test_the_place_of_a_fact_by_the_tokens_that_are_seen() -> None:
    rng = random.Random(0)
    counted = dict.fromkeys((script.INSIDE, script.EDGE, script.OUTSIDE), 0)
    for _ in range(2000):
        read, prompt, window = rng.randrange(1, 60), rng.randrange(1, 8), rng.randrange(10, 30)
        sinks, begin = rng.randrange(0, 8), rng.randrange(0, read)
        end = min(read, begin + rng.randrange(1, 6))
        question = script.Question((0,) * prompt, ((1,),), 0, (begin, end))
        visible = [index in seen(read + prompt, window, sinks) for index in range(begin, end)]
        expected = script.INSIDE if all(visible) else script.EDGE if any(visible) else script.OUTSIDE
        assert question.place(read, window, sinks) == expected
        counted[expected] += 1
    assert min(counted.values()) > 50
    assert script.Question((0,), ((1,),), 0).place(5, 4, 1) == script.OUTSIDE


# --- answers --------------------------------------------------------------------------------------------------------


class LooksInTheWindow(torch.nn.Module):
    """A "model" that writes what follows the newest tokens where they stand in its window, and else a dot.

    Its cache is a list of ids: the sinks and the newest, or all where it is given none.
    """

    device = torch.device("cpu")

    def __init__(self, window: int, sinks: int):
        super().__init__()
        self.window, self.sinks = window, sinks

    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> Any:
        ids = [] if past_key_values is None else past_key_values
        ids += input_ids[0].tolist()
        visible = [ids[index] for index in sorted(seen(len(ids), self.window, self.sinks))]
        asked = visible[-4:]  # a key of three words, and the sign behind it
        places = [place for place in range(len(visible) - 4) if visible[place : place + 4] == asked]
        word = visible[places[0] + 4] if places else TOKENIZER.convert_tokens_to_ids(".")
        logits = torch.zeros(1, input_ids.shape[1], len(TOKENIZER))
        logits[0, -1, word] = 9.0
        return type("Output", (dict,), {"logits": logits})(past_key_values=ids)


def test_a_model_that_answers_from_its_window_is_right_inside_and_wrong_outside() -> None:
    parts = lines.parts(TOKENIZER, PLAN)
    answers = asking.in_one_stream(LooksInTheWindow(W, S), None, parts, W // 2)
    places = [answer.question.place(answer.read, W, S) for answer in answers]
    assert {script.INSIDE, script.OUTSIDE} <= set(places)
    for answer, place in zip(answers, places, strict=True):
        if place != script.EDGE:
            assert answer.exact == answer.chosen == (place == script.INSIDE)
    row = recall_figures.row("it", answers, (W, S), 1.0)
    by_distance = {found["group"]: found for found in row["groups"]}
    # a line has 5 tokens, three lines and four words are read again: 2 lines back inside, 30 outside
    assert (by_distance[2]["exact"], by_distance[30]["exact"]) == (1.0, by_distance[30]["places"]["inside"])
    assert by_distance[30]["places"]["outside"] == by_distance[30]["questions"]


def by_hand(model: Any, ids: list[int], choice: script.Ids) -> tuple[float, bool]:
    """The mean log-probability of a choice behind some tokens, and whether greedy decoding writes it."""
    total, exact = 0.0, True
    for token in choice:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        exact &= int(logits.argmax()) == token
        ids = [*ids, token]
    return total / len(choice), exact


@torch.no_grad()
@pytest.mark.parametrize("sinks", [S, 0])
def test_scores_in_a_sink_cache_are_those_of_the_tokens_that_are_seen(sinks: int) -> None:
    """One layer: a key depends on its own token alone. Choices of one token; longer ones move the window."""
    model = tiny_model()
    parts = lines.parts(TOKENIZER, lines.Plan(tokens=150, distances=(1, 12), every=4))
    cache = sink_patch.SinkCache(W, sinks, model=model)
    answers = asking.in_one_stream(model, cache, parts, W // 2)
    ids = stream_of(parts)
    assert cache.get_seq_length() <= len(ids)
    assert any(answer.read > W for answer in answers)
    for answer in answers:
        text = [*ids[: answer.read], *answer.question.prompt]
        visible = [text[index] for index in sorted(seen(len(text), W, sinks))]
        for score, choice in zip(answer.scores, answer.question.choices, strict=True):
            assert score == pytest.approx(by_hand(model, visible, choice)[0], rel=1e-3)


@torch.no_grad()
def test_answers_of_several_tokens_and_one_by_one() -> None:
    model = tiny_model(2)
    rng = random.Random(1)
    made = lambda count: tuple(rng.randrange(1, len(TOKENIZER)) for _ in range(count))  # noqa: E731
    best: list[int] = []
    prompt, text = made(5), made(9)
    for _ in range(3):  # what greedy decoding writes
        logits = model(torch.tensor([[*text, *prompt, *best]]), use_cache=False).logits[0, -1]
        best.append(int(logits.argmax()))
    asked = script.Question(prompt, (tuple(best), made(1), made(4)), 0)
    missed = script.Question(prompt, ((*best[:2], best[2] - 1), made(2)), 0)
    found = asking.in_one_stream(model, None, [script.Part(text, (asked, missed))], 4)
    assert [answer.exact for answer in found] == [True, False]
    for answer in found:
        expected = [by_hand(model, [*text, *prompt], choice)[0] for choice in answer.question.choices]
        assert answer.scores == pytest.approx(expected, rel=1e-4)
        assert answer.chosen == (expected[0] > max(expected[1:]))
    (alone,) = asking.one_by_one(model, (3,), [script.Part(text, (asked,))])
    expected = [by_hand(model, [3, *prompt], choice)[0] for choice in asked.choices]
    assert alone.scores == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_questions_leave_no_trace_in_the_stream() -> None:
    model = tiny_model(2)
    parts = lines.parts(TOKENIZER, lines.Plan(tokens=200, distances=(2, 5), every=5))
    silent = [script.Part(part.ids) for part in parts[:-1]]
    last = script.Part(parts[-1].ids, parts[9].questions)
    scores = []
    for before in (parts[:-1], silent):
        cache = sink_patch.SinkCache(W, S, model=model)
        scores.append(asking.in_one_stream(model, cache, [*before, last], 5)[-1].scores)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_the_dense_cache_ends_where_the_context_does() -> None:
    parts = [script.Part((0,) * 10, (script.Question((0,) * 3, ((1, 2), (3,)), 0),))] * 4
    assert [len(asking.within(parts, limit)) for limit in (None, 45, 44, 15, 14)] == [4, 4, 3, 1, 0]
    assert asking.context(tiny_model()) == 512


# --- the file of questions, the chat --------------------------------------------------------------------------------


def write_questions(folder: Path, count: int = 8) -> Path:
    made = [
        {"question": f"What do {name} make?", "choices": ["milk", "honey and salt"], "answer": number % 2 or "milk"}
        for number, name in enumerate(words.NAMES[:count])
    ]
    file = folder / "questions.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in made) + "\n\n", encoding="utf-8")
    return file


def test_questions_stand_in_the_stream_with_their_right_answers(tmp_path: Path) -> None:
    items = questions.read(write_questions(tmp_path))
    assert [item.choices[0] for item in items[:3]] == ["milk", "honey and salt", "milk"]
    parts = questions.parts(TOKENIZER, items)
    for number, part in enumerate(parts):
        (question,) = part.questions
        read = [one for part in parts[: number + 1] for one in part.ids]
        expected = "".join(f"Question: {item.question} Answer: {item.choices[0]} " for item in items[:number])
        assert read == TOKENIZER(expected)["input_ids"]
        assert TOKENIZER.decode(question.prompt) == TOKENIZER.decode(TOKENIZER(items[number].prompt)["input_ids"])
        assert [TOKENIZER.decode(choice) for choice in question.choices] == list(items[number].choices)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Line 2 of .* is no JSON"),
        ("[]", 'no "question"'),
        ('{"question": "a", "choices": ["b"], "answer": 0}', 'no "choices"'),
        ('{"question": "a", "choices": ["b", "b"], "answer": 0}', "twice"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', 'no "answer"'),
        ('{"question": "a", "choices": ["b", "c"], "answer": true}', 'no "answer"'),
        ('{"question": "a", "choices": ["b", "c"], "answer": "d"}', 'no "answer"'),
    ],
)
def test_wrong_lines_of_the_file_are_named(tmp_path: Path, line: str, said: str) -> None:
    file = write_questions(tmp_path, 1)
    file.write_text(file.read_text().strip() + "\n" + line)
    with pytest.raises(SinkArgumentError, match=said):
        questions.read(file)


def test_the_chat_is_what_the_template_writes(tmp_path: Path) -> None:
    plan = chat.Plan(messages=40, distances=(2, 6), every=4)
    parts, system = chat.parts(TOKENIZER, plan)
    text = TOKENIZER.decode(stream_of(parts))
    assert TOKENIZER.decode(stream_of(parts)[:system]).endswith("< end >")
    assert text.count("< user >") == 21  # the greeting, and 20 facts
    said = [TOKENIZER.decode(part.ids).split("= ")[1].split()[0] for part in parts[1:]]
    for number, part in enumerate(parts[1:], start=1):
        assert len(part.questions) == (0 if number % 2 or number < 7 else 3)
        for question in part.questions:
            right = TOKENIZER.decode(question.choices[0])
            prompt = TOKENIZER.decode(question.prompt).split()
            assert prompt.index("assistant") > prompt.index("again")
            assert right not in prompt
            assert question.fact is not None
            assert right in TOKENIZER.decode(stream_of(parts)[slice(*question.fact)]).split()
            if question.group == chat.SYSTEM:
                assert question.fact == (0, system)
            else:
                assert right == said[number - int(question.group) // 2]


def test_chats_that_cannot_be_are_refused() -> None:
    with pytest.raises(SinkArgumentError, match="no chat template"):
        chat.parts(tokenizer(chat_template=None), chat.Plan())
    forgetful = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(SinkArgumentError, match="anew"):
        chat.parts(tokenizer(chat_template=forgetful), chat.Plan())
    for wrong in ({"every": 3}, {"distances": (3,)}, {"distances": ()}, {"messages": 4}):
        with pytest.raises(SinkArgumentError):
            chat.Plan(**wrong)  # type: ignore[arg-type]


# --- attention and the number of sinks ------------------------------------------------------------------------------


@torch.no_grad()
def test_shares_are_those_of_the_eager_attentions() -> None:
    model = tiny("llama", layers=2, attention="eager")
    ids = torch.arange(21) * 5 % 90 + 2
    layers = attention.of_text(model, ids)
    expected = model(ids[None], output_attentions=True).attentions
    assert len(layers) == len(expected) == 2
    for layer, weights in zip(layers, expected, strict=True):
        for head, share in enumerate(layer.share(3).tolist()):
            rows = [sum(float(weights[0, head, query, key]) for key in range(3)) for query in range(10, 21)]
            assert share == pytest.approx(sum(rows) / len(rows), rel=1e-5)
        assert float(layer.elsewhere().max()) < 1e-5
        assert layer.mean_map.tolist() == weights[0].mean(0).tolist()


@torch.no_grad()
def test_other_attention_is_switched_for_the_maps_and_back() -> None:
    ids = torch.arange(12) + 2
    fast, eager = (tiny("llama", layers=2, attention=name) for name in ("sdpa", "eager"))
    found = [[layer.share(2) for layer in attention.of_text(model, ids)] for model in (fast, eager)]
    assert fast.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.skipif("gpt_oss" not in FAMILIES, reason="transformers has no gpt-oss")
def test_learned_sinks_are_found() -> None:
    model = tiny("gpt_oss", layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=128)
    for layer in attention.of_text(model, torch.arange(16) + 2):
        assert (layer.elsewhere() > 0).all()
        later = layer.weights[:, 8:]
        assert layer.elsewhere().tolist() == pytest.approx((1 - later.sum(-1).mean(-1)).tolist(), abs=1e-5)


@torch.no_grad()
def test_perplexity_over_sinks_by_plain_forwards() -> None:
    model, window, piece = tiny_model(), 70, 32
    ids = torch.arange(150) * 7 % 90 + 1
    found = run.scores(model, ids, run.Plan(window, 2, sinks=(0, 3), tokens=150, attention_tokens=30))
    for sinks, scores in found.items():
        expected = []
        for start in range(window, 149, piece):
            behind = min(start + piece, 149)  # room is made for the whole piece
            for token in range(start, behind):
                visible = [*range(sinks), *range(behind - window + sinks, token + 1)]
                logits = model(ids[visible][None], use_cache=False).logits[0, -1]
                expected.append(-float(logits.log_softmax(-1)[ids[token + 1]]))
        assert scores.tolist() == pytest.approx(expected, rel=1e-3)


def record(perplexities: dict[int, float], elsewhere: float = 0.0) -> dict[str, Any]:
    logs = {number: torch.tensor([value]).log() for number, value in perplexities.items()}
    layer = {"layer": 0, "share": 0.5, "elsewhere": elsewhere, "heads": [0.4, 0.6]}
    return {
        "model": "it",
        "attention": {"layers": [layer], "first": 4},
        "perplexity": figures.perplexity(logs),
    }


@pytest.mark.parametrize(
    ("perplexities", "elsewhere", "said"),
    [
        (
            {0: 50.0, 1: 25.0, 4: 20.1, 8: 20.0},
            0.0,
            "it needs 4 sinks: with them its perplexity is 20.10 (25.00 with 1)",
        ),
        ({0: 50.0, 1: 20.0, 4: 20.1}, 0.0, "it needs 1 sink: with it"),
        ({0: 20.1, 4: 20.0}, 0.0, "it needs no sinks: without them .* gated"),
        ({0: 20.1, 4: 20.0}, 0.3, "it needs no sinks: .* 30% of its attention lies on sinks that it has learned"),
        ({0: float("nan"), 2: 20.0}, 0.0, "it needs 2 sinks: .* (no number with 0)"),
        ({4: 20.0}, 0.0, "fewer were not tried"),
        ({0: float("nan")}, 0.0, "writes no numbers"),
    ],
)
def test_how_many_sinks_are_needed(perplexities: dict[int, float], elsewhere: float, said: str) -> None:
    answer = figures.answer(record(perplexities, elsewhere))
    assert re.search(said.replace("(", r"\(").replace(")", r"\)"), answer), answer


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(2).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return str(directory)


SIZES = ["--window-length", str(W), "--num-sink-tokens", str(S)]


def measured(arguments: list[str], folder: Path, *, draw: bool = False) -> dict[str, Any]:
    """The record of a command, drawn where that is asked for (it takes a second) and matplotlib is installed."""
    files = [folder / "a.json", folder / "a.png"]
    drawn = ["--plot", str(files[1])] if draw and find_spec("matplotlib") else []
    assert cli.main(["eval", *arguments, "--json", str(files[0]), *drawn]) == 0
    assert not drawn or files[1].read_bytes().startswith(b"\x89PNG")
    written = files[0].read_text(encoding="utf-8")
    assert str(folder) not in written
    return json.loads(written)


def test_streameval(model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--windows", "4", "--every", "4", "--distance", "1,30", "--dense-lines", "35"]
    found = measured(["streameval", model_dir, *SIZES, *options], tmp_path, draw=True)
    ways = ["2 sinks", "dense", "2 sinks, as far as dense"]
    assert [row["way"] for row in found["rows"]] == ways
    assert [group["questions"] for group in found["rows"][0]["groups"]] == [11, 5]
    assert [group["questions"] for group in found["rows"][1]["groups"]] == [7, 1]
    assert found["rows"][0]["groups"][1]["places"]["outside"] == 5
    out, err = capsys.readouterr()
    assert all(way in out for way in ways)
    assert "100%" in err


def test_streameval_of_a_file(model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_questions(tmp_path)
    found = measured(["streameval", model_dir, *SIZES, "--questions", str(file)], tmp_path)
    assert [row["way"] for row in found["rows"]] == ["2 sinks", "0 sinks", "dense", "one by one"]
    assert {group["questions"] for row in found["rows"] for group in row["groups"]} == {8}
    assert found["questions"]["name"] == "questions.jsonl"
    (panel,) = recall_figures.panels(found)
    assert [curve.label for curve in panel.curves] == ["2 sinks", "0 sinks", "dense", "one by one"]
    assert "one by one" in capsys.readouterr().out


def test_recall(model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--messages",
        "24",
        "--every",
        "4",
        "--distance",
        "2,8",
        "--dense-messages",
        "16",
        "--window-length",
        "90",
    ]
    found = measured(["recall", model_dir, *options], tmp_path)
    assert [row["way"] for row in found["rows"][:3]] == ["4 sinks", "system message kept", "dense"]
    by_way = {row["way"]: row["groups"][-1]["places"] for row in found["rows"][:2]}
    assert {row["groups"][-1]["group"] for row in found["rows"]} == {chat.SYSTEM}
    assert by_way["system message kept"]["inside"] == 3
    assert by_way["4 sinks"]["inside"] == 0
    assert found["system_tokens"] > 10
    for panel in recall_figures.panels(found):
        assert [list(curve.x) for curve in panel.curves[:2]] == [
            [2, 8],
            [2, 8],
        ]  # and what is asked of the system message
    capsys.readouterr()


def test_sinks(model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words.WORDS) * 2)
    options = ["--text", str(file), "--tokens", "150", "--attention-tokens", "30", "--sinks", "2,0"]
    options += ["--window-length", "70", "--num-sink-tokens", "2"]
    found = measured(["sinks", model_dir, *options], tmp_path, draw=True)
    assert found["perplexity"]["sinks"] == [0, 2]
    assert [len(layer["heads"]) for layer in found["attention"]["layers"]] == [2, 2]
    out = capsys.readouterr().out
    assert "share of attention on the first 2 of 30 tokens" in out
    assert "tiny needs" in out
    shares, perplexity = figures.panels(found)
    assert [list(curve.x) for curve in shares.curves] == [[0, 1]] * 3
    assert (perplexity.curves[0].x, perplexity.curves[0].y) == ([0, 2], found["perplexity"]["perplexity"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["streameval", "no/model", "--questions", "no/file.jsonl"], "cannot be read"),
        (["streameval", "no/model", "--ways", "sinks,moons"], "'moons' is not known"),
        (["streameval", "no/model", "--ways", "alone"], "needs --questions"),
        (["streameval", "no/model", "--every", "0"], "every=0"),
        (["streameval", "no/model", "--dense-lines", "0"], "Give 1 or more"),
        (["streameval", "no/model", "--json", "no/such/x.json"], "no directory"),
        (["streameval", "no/model", "--window-length", "4"], "leaves no room"),
        (["recall", "no/model", "--distance", "3"], "even numbers"),
        (["recall", "no/model", "--plot", "no/such/x.png"], "no directory"),
        (["sinks", "no/model", "--text", "no/file.txt"], "cannot be read"),
        (["sinks", "no/model", "--text", "no/file.txt", "--tokens", "300"], "512 tokens or more"),
        (["sinks", "no/model", "--text", "no/file.txt", "--window-length", "60"], "too short"),
        (["sinks", "no/model", "--text", "no/file.txt", "--attention-tokens", "3"], "attention_tokens=3"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sink_patch.evaluate.models.load", lambda *_: pytest.fail("a model was loaded"))
    assert cli.main(["eval", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_numbers_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "streameval", "it", "--distance", "5,x"])
    assert "list of numbers" in capsys.readouterr().err
