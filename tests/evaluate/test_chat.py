"""`sink-patch chat`: the real program in a terminal against a replay, and its parts in this process."""

from __future__ import annotations

import io
import json
import signal
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sink_patch import CacheFileError, SinkArgumentError, SinkCache, cli
from sink_patch.evaluate import models
from sink_patch.evaluate.chat import files, picture, program, show
from sink_patch.evaluate.chat.conversation import Conversation
from sink_patch.evaluate.chat.settings import Settings
from sink_patch.evaluate.chat.template import Template
from tests.support import directory
from tests.support.chats import Window
from tests.support.fresh import environment
from tests.support.server import ROOT
from tests.support.terminal import Terminal
from tests.support.tiny import tiny

W, NEW, SINKS = 24, 9, 6
SYSTEM = "w80 w81 w82"
# <start> role words <end>: w1 w4 (the system), w1 w5 (the user), w1 w6 (the model), w2
_ROLE = "w1 {{ {'system': 'w4', 'user': 'w5', 'assistant': 'w6'}[message.role] }} "
_END = "{% endfor %}{% if add_generation_prompt %}w1 w6{% endif %}"
TURN_START = ((1,),)
TEMPLATE = f"{{% for message in messages %}}{_ROLE}{{{{ message.content }}}} w2 {_END}"
STRIPPED = (
    f"{{% for message in messages %}}{_ROLE}{{% if message.role == 'assistant' %}}"
    "{{ message.content.split()[3:] | join(' ') }}{% else %}{{ message.content }}{% endif %} w2 "
    "{% endfor %}{% if add_generation_prompt %}w1 w6 w7{% endif %}"
)
"""Answers lose their first words, and the prompt of an answer has one that is not in the history."""
MOVED = (
    "{% for message in messages %}{% if message.role != 'system' %}"
    "w1 {{ {'user': 'w5', 'assistant': 'w6'}[message.role] }} "
    "{% if loop.last %}{{ messages[0].content }} {% endif %}{{ message.content }} w2 {% endif %}" + _END
)
"""The system prompt moves to the newest message."""
UNMARKED = "{% for message in messages %}{{ message.content }} w2 {% endfor %}"


def tokenizer(template: str | None = TEMPLATE):
    made = directory.tokenizer()
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = {"window_length": 30, "num_sink_tokens": 2, "keep_streams": 4}  # which what the chat asks for beats
    where = directory.write(tmp_path_factory.mktemp("model"), cache_implementation="sink", cache_config=own)
    tokenizer().save_pretrained(where)
    return where


def conversation(template: str | None = TEMPLATE, model: Any = None, **settings: Any) -> Conversation:
    asked = {"window_length": W, "max_new_tokens": NEW, "system": SYSTEM, "greedy": True, **settings}
    words = tokenizer(template)
    loaded = models.Loaded("tiny", directory.model() if model is None else model, words)
    return Conversation(loaded, Template(words), Settings(**asked))


def words(turn: int) -> str:
    return " ".join(f"w{20 + (7 * turn + place) % 50}" for place in range(2 + turn % 3))


def said(talk: Conversation, turn: int, over: int = 10**9) -> str:
    """The answer, which is over after so many pieces."""
    pieces: list[str] = []
    talk.answer(words(turn), pieces.append, lambda: len(pieces) >= over)
    return "".join(pieces)


class Replay:
    """The same talk in a loop of its own over one cache; counts the tokens that the model reads."""

    def __init__(self) -> None:
        self.model, self.tokenizer, self.read, self.fed = directory.model(), tokenizer(), 0, 0
        self.cache = SinkCache(W, SINKS, evict="turns", turn_start=TURN_START, model=self.model)
        self.messages: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]

    def ids(self, *, answering: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=answering)
        return self.tokenizer(text)["input_ids"]

    @torch.no_grad()
    def forward(self, ids: Sequence[int]) -> int:
        self.read += len(ids)
        logits = self.model(torch.tensor([list(ids)]), past_key_values=self.cache).logits
        return int(logits[0, -1].argmax())

    def answer(self, text: str, over: int = NEW) -> str:
        self.messages.append({"role": "user", "content": text})
        asked, ids = self.ids(answering=False), self.ids(answering=True)
        self.forward(asked[self.read :])
        token, made = self.forward(ids[self.read :]), []
        for _ in range(over):
            made.append(token)
            token = self.forward([token])
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(made)})
        return self.messages[-1]["content"]


def fed_to(model: Any, columns: list[int]) -> Any:
    """A hook that notes how many columns each forward has."""
    return model.register_forward_pre_hook(
        lambda _module, args, kwargs: columns.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )


# --- the program ------------------------------------------------------------------------------------------------------


def answers_in(printed: str) -> list[str]:
    """What was printed between what was typed and the next prompt."""
    return [part.partition("\n")[2].strip() for part in printed.split(program.PROMPT)[1:]]


def test_a_talk_over_many_windows_in_a_terminal(folder, tmp_path):
    replay = Replay()
    typed = [*map(words, range(7)), "/window", "/save talk", words(7), "/load talk", words(7), "/nothing", "/exit"]
    wanted = {turn: replay.answer(words(turn)) for turn in range(8)}
    asked = ["--system", SYSTEM, "--window-length", str(W), "--max-new-tokens", str(NEW), "--greedy"]
    command = [sys.executable, "-m", "sink_patch.cli", "chat", str(folder), *asked]
    terminal = Terminal(command, tmp_path, environment([ROOT]))
    for number, line in enumerate(typed):
        terminal.wait_for(program.PROMPT, number + 1)
        terminal.type(line)
    assert terminal.end() == 0
    assert "a window of 24 tokens of which the first 6 stay" in terminal.printed
    assert "Warning" not in terminal.printed
    answers = answers_in(terminal.printed)
    assert answers[:7] == [wanted[turn] for turn in range(7)]
    assert "have left it." in answers[7]
    assert answers[8] == "Saved: talk"
    assert answers[9] == answers[11] == wanted[7]
    assert answers[10].startswith("Loaded: talk, 15 messages")
    assert answers[12].startswith("sink-patch: There is no command /nothing.")
    assert replay.cache.get_seq_length() > 4 * W


def run(monkeypatch: pytest.MonkeyPatch, lines: Sequence[Any], talk: Conversation, template: str | None) -> str:
    """What the program writes for some lines; an exception among them is raised where a line is read."""
    given, out = iter(lines), io.StringIO()

    def read(_prompt: str) -> str:
        line = next(given, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    loaded = models.Loaded("tiny", talk.model, talk.tokenizer)
    settings = Settings(window_length=W, max_new_tokens=NEW, system=SYSTEM, greedy=True)
    program.run(loaded, Template(tokenizer(template)), settings, out)
    return out.getvalue()


def test_ctrl_c_at_the_prompt_ends_nothing_and_ctrl_d_the_chat(monkeypatch):
    lines = [KeyboardInterrupt(), "/help", " ", words(0), "/save", "/reset", "/window"]
    out = run(monkeypatch, lines, conversation(), TEMPLATE)
    assert "Ctrl-D or /exit ends the chat." in out
    assert program.HELP in out
    assert Replay().answer(words(0)) in out
    assert "/save needs the name of a file" in out
    assert "Forgotten; the system prompt stays." in out
    assert "The window holds 0 of 24 tokens" in out


def test_the_second_ctrl_c_in_an_answer_is_not_held_back():
    with program.interruptible() as is_over:
        assert not is_over()
        signal.raise_signal(signal.SIGINT)
        assert is_over()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("template", "told"),
    [(TEMPLATE, ""), (UNMARKED, "does not tell where messages begin"), (None, "has no chat template")],
)
def test_it_says_where_single_tokens_leave(monkeypatch, template, told):
    talk = conversation(template)
    out = run(monkeypatch, [words(0)], talk, template)
    assert told in out
    assert out.count("one by one") == bool(told)
    assert talk.state.cache.evict == ("tokens" if told else "turns")


# --- the talk ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_answer_and_the_talk_goes_on_with_what_was_said(monkeypatch):
    talk, replay = conversation(), Replay()
    taking, pieces = program.Program(talk, io.StringIO()), []

    def say(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2 * NEW + 4:  # the fourth token of the third answer
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(taking, "_say", say)
    monkeypatch.setattr(taking, "tell", lambda _line: None)
    for turn in range(5):
        taking.take(words(turn))
        replay.answer(words(turn), 4 if turn == 2 else NEW)
    assert talk.state.messages == replay.messages


def test_each_turn_reads_its_new_tokens_alone():
    columns: list[int] = []
    talk, replay = conversation(), Replay()
    hook = fed_to(talk.model, columns)
    try:
        for turn in range(6):
            said(talk, turn)
    finally:
        hook.remove()
    for turn in range(6):
        replay.answer(words(turn))
    assert sum(columns) == replay.read == len(talk.state.ids)
    assert talk.state.messages == replay.messages


@pytest.mark.parametrize(
    ("template", "reads_again"), [(TEMPLATE, 0), (STRIPPED, 1), (MOVED, 2), (UNMARKED, 0), (None, 0)]
)
def test_within_the_window_an_answer_is_that_of_the_default_cache(template, reads_again):
    """Also where the template writes answers anew: they alone are read again; and where it writes all anew."""
    columns: list[int] = []
    talk = conversation(template, window_length=200, max_new_tokens=7)
    own, fresh = Template(talk.tokenizer), directory.model()
    for turn in range(4):
        messages = [*talk.state.messages, {"role": "user", "content": words(turn)}]
        ids, before, columns[:] = own.ids(messages, answering=True), len(talk.state.ids), []
        hook = fed_to(talk.model, columns)
        found = said(talk, turn)
        hook.remove()
        made = fresh.generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False)[0]
        assert found == talk.tokenizer.decode(made[len(ids) :])
        assert talk.state.ids == made.tolist()
        new = sum(columns) - 7
        if reads_again < 2 and turn:
            rewritten = 4 + 1 + 2 + 1 if reads_again else 0  # its four words, w7 and what is around them
            assert new <= len(ids) - before + rewritten + 5
            assert new < len(ids) // 2 or turn < 2
        assert turn == 0 or (new == len(ids)) == (reads_again == 2)


def test_the_end_of_an_answer_is_obeyed_and_not_said():
    talk = conversation(max_new_tokens=40)
    first = said(talk, 0).split()
    ends = first[5]
    model = directory.model()
    own = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [int(ends[1:]), 0]
        talk = conversation(max_new_tokens=40)
        assert said(talk, 0).split() == first[: first.index(ends) + 1]  # no special token here, so that it is shown
    finally:
        model.generation_config.eos_token_id = own


@pytest.mark.parametrize("at", [1, 6])
def test_an_answer_that_fails_was_not_said(at):
    talk, replay = conversation(), Replay()
    for turn in range(4):
        said(talk, turn)
        replay.answer(words(turn))
    before, count = list(talk.state.messages), [0]

    def fail(*_args: Any) -> None:
        count[0] += 1
        if count[0] == at:
            raise MemoryError

    hook = talk.model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        said(talk, 9)
    hook.remove()
    assert talk.state.messages == before == replay.messages
    again = conversation()
    again.state.messages = before
    assert said(talk, 9) == said(again, 9)  # the same words once more: all of the text is read again
    assert talk.state.messages == again.state.messages
    talk.reset()
    assert said(talk, 0) == replay.messages[2]["content"]


# --- what it keeps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TEMPLATE, STRIPPED])
def test_after_load_the_next_answers_are_what_they_would_have_been(template, tmp_path):
    talk = conversation(template, greedy=False, seed=5)
    for turn in range(4):
        said(talk, turn)
    files.save(tmp_path / "talk", talk)
    other = conversation(template, greedy=False, system=None, window_length=40)
    other.state = files.load(tmp_path / "talk", other)
    columns: tuple[list[int], list[int]] = ([], [])
    for one, fed in zip((talk, other), columns, strict=True):
        hook = fed_to(one.model, fed)
        said(one, 5)
        said(one, 6)
        hook.remove()
    assert columns[0] == columns[1]  # nothing is read again
    assert other.state.messages == talk.state.messages
    files.save(tmp_path / "talk", other)  # over a talk
    talk.state = files.load(tmp_path / "talk", talk)
    assert said(talk, 7) == said(other, 7)


def test_a_talk_of_nothing_can_be_kept(tmp_path):
    talk = conversation()
    files.save(tmp_path / "talk", talk)
    talk.state = files.load(tmp_path / "talk", talk)
    assert said(talk, 0) == Replay().answer(words(0))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    talk = conversation()
    for turn in range(3):
        said(talk, turn)
    files.save(path := tmp_path_factory.mktemp("kept") / "talk", talk)
    return path


def test_a_talk_of_another_model_or_template_is_refused(kept):
    model = tiny("llama", layers=2, attention="sdpa", max_position_embeddings=directory.CONTEXT, seed=1)
    with pytest.raises(CacheFileError, match=f"{kept} was saved with another model"):
        files.load(kept, conversation(model=model))
    with pytest.raises(CacheFileError, match="another chat template"):
        files.load(kept, conversation(STRIPPED))


def rewritten(kept: Path, target: Path, change: str) -> Path:
    with zipfile.ZipFile(kept) as old, zipfile.ZipFile(target, "w") as new:
        compression = zipfile.ZIP_DEFLATED if change == "packed" else zipfile.ZIP_STORED
        for name in old.namelist():
            data = old.read(name)
            if name == "talk.json":
                talk = json.loads(data)
                talk["ids"] = {"ids": [*talk["ids"][:-1], 3], "short": talk["ids"][:-1]}.get(change, talk["ids"])
                talk["seed"] = "x" if change == "type" else talk["seed"]
                data = json.dumps(talk).encode()
            elif name == "cache.safetensors" and change in ("no cache", "cut"):
                data = data[:1000]
            if not (change == "no cache" and name == "cache.safetensors"):
                new.writestr(name, data, compress_type=compression)
    return target


@pytest.mark.parametrize("change", ["ids", "short", "type", "packed", "no cache", "cut"])
def test_a_damaged_talk_is_refused(kept, tmp_path, change):
    with pytest.raises(CacheFileError, match=str(tmp_path / "talk")):
        files.load(rewritten(kept, tmp_path / "talk", change), conversation())


def test_other_files_are_not_taken_for_talks(kept, tmp_path):
    other = tmp_path / "book.txt"
    other.write_text("Call me Ishmael.")
    with pytest.raises(CacheFileError, match="is no saved chat"):
        files.load(other, conversation())
    with pytest.raises(CacheFileError, match="is not there"):
        files.load(tmp_path / "nothing", conversation())
    with pytest.raises(CacheFileError, match="is there already"):
        files.save(other, conversation())
    assert other.read_text() == "Call me Ishmael."
    with pytest.raises(CacheFileError, match="could not be written"):
        files.save(tmp_path / "nowhere" / "talk", conversation())
    assert sorted(tmp_path.iterdir()) == [other]


# --- what the window holds --------------------------------------------------------------------------------------------


def long_talk(turns: int = 4) -> Conversation:
    talk = conversation()
    for turn in range(turns):
        said(talk, turn)
    return talk


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_window_is_told_message_by_message():
    """The tokens that it counts are those of the window in plain Python, turn by turn."""
    talk = conversation()
    oracle, seen = Window([], W, SINKS, TURN_START), 0
    for turn in range(7):
        said(talk, turn)
        oracle.text, border = talk.state.ids, talk.state.borders[-1]
        oracle.visible(seen, border - seen)  # the message of the user
        visible = oracle.visible(border, 2)  # w1 w6
        for place in range(border + 2, len(oracle.text)):
            visible = oracle.visible(place, 1)
        seen = len(oracle.text)
        window, lines, gone = show.lines(talk)
        assert [*window.sinks, *window.recent] == visible
        assert sum(line.held for line in lines) == len(visible)
        assert len(lines) + gone == talk.state.ids.count(1)
        for line in lines:
            places = set(line.place)
            assert line.held == len(places & set(visible))
            assert (line.state == show.PART) == (not places <= set(visible))
    assert gone > 6


def test_what_it_says():
    talk, plain, colours = long_talk(), io.StringIO(), Screen()
    show.write(talk, plain)
    show.write(talk, colours)
    window, lines, gone = show.lines(talk)
    head, first, left, *others = plain.getvalue().splitlines()
    assert head == f"The window holds {len(window)} of {W} tokens, and {len(window.left)} have left it."
    assert first.split() == ["kept", "6", "w1", "w4", *SYSTEM.split(), "w2"]
    assert left.split() == ["left", str(len(window.left)), f"({gone}", "messages)"]
    assert [line.split()[0] for line in others] == ["whole"] * (len(lines) - 1)
    assert len(others) > 1
    assert "\x1b[" in colours.getvalue()
    assert "\x1b[" not in plain.getvalue()


@pytest.mark.parametrize(
    ("template", "state"), [(TEMPLATE, ["kept", "left", "in part"]), (None, ["in part", "left", "in part"])]
)
def test_a_message_that_is_in_the_window_in_part(template, state):
    talk, out = conversation(template, max_new_tokens=30), io.StringIO()
    said(talk, 0)
    show.write(talk, out)
    _, *lines = out.getvalue().splitlines()
    assert [line[2:9].strip() for line in lines] == state
    sinks = talk.state.cache.num_sink_tokens
    assert template is not None or " 4 of 5  w80 w81 w82 w20 w21" in lines[0]
    assert f" {W - sinks} of {len(talk.state.ids) - talk.state.borders[-1]}  " in lines[-1]


def test_without_rich_it_is_plain(monkeypatch):
    monkeypatch.setattr(show, "find_spec", lambda _name: None)
    talk, plain, screen = long_talk(2), io.StringIO(), Screen()
    show.write(talk, plain)
    show.write(talk, screen)
    assert screen.getvalue() == plain.getvalue()


def test_the_picture(tmp_path, monkeypatch):
    talk = long_talk()
    picture.draw(tmp_path / "window.png", talk)
    assert (tmp_path / "window.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SinkArgumentError, match=r"Give a file that ends with \.png"):
        picture.draw(tmp_path / "window.tale", talk)
    with pytest.raises(SinkArgumentError, match="could not be written"):
        picture.draw(tmp_path / "nowhere" / "window.png", talk)
    picture.draw(tmp_path / "empty.png", conversation())
    monkeypatch.setattr(picture, "find_spec", lambda _name: None)
    with pytest.raises(SinkArgumentError, match="pip install matplotlib"):
        picture.draw(tmp_path / "window.png", talk)


# --- what is refused before a model is loaded -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--window-length", "0"], "leaves no room"),
        (["--window-length", "-3"], "is negative"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--temperature", "0"], "--temperature 0.0"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (["--greedy", "--top-p", "0.5"], "--greedy draws nothing"),
        (["--seed", "-1"], "--seed -1"),
        (["--system", " ".join(["w5"] * 30), "--window-length", "24"], "leaves no room for a talk: 33 tokens"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(folder, asked, said, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda *_args: pytest.fail("a model was loaded"))
    assert cli.main(["chat", str(folder), *asked]) == 2
    assert said in capsys.readouterr().err


def test_a_template_without_a_system_prompt_says_so():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    template = Template(tokenizer(refusing + TEMPLATE))
    with pytest.raises(SinkArgumentError, match=r"takes no system prompt \(No system\)\. Leave it out"):
        template.check_room(Settings(system="Be kind."))
    template.check_room(Settings())


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("./nothing", "there is no such directory"),
        ("/nothing/at/all", "there is no such directory"),
        ("one/two/three", "there is no such directory"),
        ("", "there is no such directory"),
        ("empty", "there is no config.json in it"),
        ("file", "it is a file"),
    ],
)
def test_a_wrong_path_is_refused_before_anything_is_asked(where, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *_args: pytest.fail("a model was loaded"))
    assert cli.main(["chat", where]) == 2
    err = capsys.readouterr().err
    assert f"The model {where!r} cannot be loaded: {said}." in err


def test_sampling_is_what_was_asked_for_then_what_the_model_says():
    own = directory.model().generation_config
    assert Settings().sampling(own) == {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    asked = Settings(temperature=0.2, top_p=1.0).sampling(own)
    assert asked == {"do_sample": True, "temperature": 0.2, "top_p": 1.0}
    assert Settings(greedy=True).sampling(own) == {"do_sample": False}
    own_way = type(own)(temperature=0.6, top_p=0.95, do_sample=True)
    assert Settings().sampling(own_way) == {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
