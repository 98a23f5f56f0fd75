"""A CLIP-style byte-pair tokenizer for a small world, learnt from its captions; saved in the format CLIPTokenizer loads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], folder: Path, vocabulary: int, max_tokens: int) -> CLIPTokenizer:
    """Learn at most `vocabulary` tokens and save them under `folder`, or load what is there already: among pairs of equal count the
    learner's choice is not repeatable, and a resumed run must spell as it did. `max_tokens` counts the start and end tokens."""
    if (folder / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    alphabet = [*"abcdefghijklmnopqrstuvwxyz0123456789-"]
    alphabet += [letter + "</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[START, END], end_of_word_suffix="</w>", show_progress=False
    )
    # Every letter must be a token on its own, inside and at the end of a word, so that unseen words are spelt, not lost.
    spelling = [letter + " " + letter * 2 for letter in alphabet if len(letter) == 1]
    bpe.train_from_iterator([*captions, *spelling], trainer)
    model = json.loads(bpe.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=max_tokens, pad_token=END, unk_token=END)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids padded to the model's length, shape (B, L), as StableDiffusionPipeline pads them."""
    length = tokenizer.model_max_length
    ids = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")["input_ids"]
    return torch.as_tensor(ids)
