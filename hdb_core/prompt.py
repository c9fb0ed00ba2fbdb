"""What a prompt says: the rare token that means a person, and what a photo shows besides."""

from __future__ import annotations

import re

CLASS_PROMPT = "a face"
MOST_CHARACTERS = 2000  # of a prompt; encoding takes as long as it is, and a stranger's file brings one


def rare_token(prompt: str, class_prompt: str = CLASS_PROMPT) -> str:
    """What means the person in a prompt: the tokens in brackets, or without any, the words that its class prompt lacks.

    >>> rare_token("a photo of a [v] face"), rare_token("a sks face")
    ('[v]', 'sks')
    """
    known = set(class_prompt.split())
    return " ".join(re.findall(r"\[[^\[\]\s]+\]", prompt) or [word for word in prompt.split() if word not in known])


def caption(prompt: str, words: str) -> str:
    """The prompt and a photo's own words: "a [v] face, smiling"."""
    return f"{prompt}, {words}" if words else prompt


def require_text(words: str) -> str:
    """The same words, if they are text and no longer than a prompt.

    Raises:
        ValueError: if they are.
    """
    if len(words) > MOST_CHARACTERS:
        raise ValueError(f"words of {len(words):,} characters, where {MOST_CHARACTERS:,} are the most")
    if "\0" in words:  # of UTF-16 that was read as UTF-8
        raise ValueError("words with a NUL character")
    return words
