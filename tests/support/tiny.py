"""Tiny fast tokenizers, one of each family, made in milliseconds and equal on every machine."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "The river rises in the hills north of the town and reaches the sea after ninety kilometres.",
    "Please send me the invoice for last month and tell me whether the second payment has arrived.",
    "To make the dough, mix the flour with a little salt, add warm water and knead it for ten minutes.",
    "user assistant system prompt completion question answer hello world yes no thank you",
    "What is the difference between a virus and a bacterium? You are a helpful assistant.\n\n",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Grüße aus Köln, 東京 und Москва.",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = none %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system is not none %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_level_tokenizer(*, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen and SmolLM2 have it: offsets keep the leading space, no BOS, ChatML tokens."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat_template
    )


def gpt2_tokenizer(*, prefix_space: bool = False, chat_template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's own post-processor, which takes the leading space out of a token's offsets."""
    tokenizer = _byte_level(["<|endoftext|>"], prefix_space=prefix_space)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=prefix_space)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=chat_template,
    )


def metaspace_tokenizer(*, chat_template: str | None = LLAMA2) -> PreTrainedTokenizerFast:
    """BPE with Metaspace, bytes for unknown characters and a BOS, as Llama-2's family has it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    alphabet = [chr(c) for c in range(33, 127)]
    trained.train_from_iterator(
        CORPUS[:4], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate([*first, *sorted(model["vocab"], key=model["vocab"].get)])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def wordpiece_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """WordPiece as BERT has it: lower-cased, without accents, [CLS] and [SEP] around plain text; no chat template."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [word.lower() for word in _words() if word.isascii()]
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    vocabulary = dict.fromkeys(
        [*special, *letters, *("##" + c for c in letters), *words, *("##" + w[2:] for w in words)]
    )
    vocabulary.pop("##", None)
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        chat_template=chat_template,
    )


def _words() -> list[str]:
    return sorted({word for text in CORPUS for word in text.split()})


def _byte_level(special: list[str], *, prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer
