"""Chat templates like those of known models, written anew, and a tokenizer of bytes and special tokens for them."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]"),
)


def byte_level(chat_template: str | None, **options: str) -> PreTrainedTokenizerFast:
    """One byte or special token, one id; bytes have their own number."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    letters.update({byte: chr(256 + place) for place, byte in enumerate(others)})
    made = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    names = {"model_input_names": ["input_ids", "attention_mask"], "bos_token": "<s>", "eos_token": "</s>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=chat_template, **names)


@dataclass(frozen=True)
class Style:
    """A template, and what begins its messages, in text; `system` None: that cannot be told."""

    template: str
    turns: tuple[str, ...]
    system: str | None


_EACH = "{% for m in messages %}"
_END = "{% endfor %}"
_GEN = "{% if add_generation_prompt %}"
_CHATML = _EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + _END
_CHATML_GEN = _GEN + "<|im_start|>assistant\n{% endif %}"
_DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
_MERGED = (  # the system message goes into the first one of the user
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
)
_GEMMA_TURNS = (
    "{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (first if loop.first else '') + m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"

STYLES = {
    "ChatML": Style(_CHATML + _CHATML_GEN, ("<|im_start|>",), "<|im_start|>s"),
    "a default system message": Style(_DEFAULT + _CHATML + _CHATML_GEN, ("<|im_start|>",), "<|im_start|>s"),
    "Qwen 3": Style(  # thoughts are written in the last turn alone
        _EACH
        + "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n" + _END + _CHATML_GEN,
        ("<|im_start|>",),
        "<|im_start|>s",
    ),
    "Llama 3": Style(
        "{{ bos_token }}"
        + _EACH
        + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        + _END
        + _GEN
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>",),
        "<s><|start_header_id|>s",
    ),
    "Llama 3.1": Style(  # always a system message, with the date of the day in it
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set turns = messages[1:] %}{% else %}"
        "{% set turns = messages %}{% endif %}<|eot_id|>{% for m in turns %}<|start_header_id|>{{ m.role }}"
        "<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}",
        ("<|start_header_id|>",),
        "<s><|start_header_id|>s",
    ),
    "Gemma": Style(
        "{{ bos_token }}" + _NO_SYSTEM + "{% set turns = messages %}{% set first = '' %}" + _GEMMA_TURNS,
        ("<start_of_turn>",),
        None,
    ),
    "Gemma 3": Style(_MERGED + _GEMMA_TURNS, ("<start_of_turn>",), None),
    "Phi 3": Style(  # writes an end of text where no message of the assistant is asked for
        _EACH
        + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
        + _END
        + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|assistant|>\n", "<|user|>\n", "<|system|>\n"),
        "<|system|>",
    ),
    "Llama 2": Style(
        "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
        "{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set turns = messages %}"
        "{% set first = '' %}{% endif %}{% for m in turns %}{% if m.role == 'user' %}"
        "{{ bos_token }}[INST] {{ (first if loop.first else '') + m.content }} [/INST]{% else %} {{ m.content }} "
        "{{ eos_token }}{% endif %}{% endfor %}",
        ("<s>[INST] ",),
        "<s>[INST] <<SYS>>\n",
    ),
    "Mistral": Style(
        "{{ bos_token }}" + _NO_SYSTEM + "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST] ",),
        None,
    ),
    "Alpaca": Style(  # plain words, of which the first ones are in harmless texts too
        _EACH + "{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}### Instruction:\n"
        "{{ m.content }}\n\n{% else %}### Response:\n{{ m.content }}\n\n{% endif %}" + _END,
        ("### Response:\n", "### Instruction:\n"),
        None,
    ),
}
