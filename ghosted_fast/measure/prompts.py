"""What models are asked where their answers are compared: questions built in, or out of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from ghosted_fast.errors import SourceError
from ghosted_fast.text.loading import load_texts

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
    "List three things that are needed to bake bread.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "Translate into French: The train leaves at nine o'clock.",
    "What is the difference between a lake and a river?",
    "Write a polite letter that declines an invitation to dinner.",
    "How does a bicycle stay upright?",
    "Name the planets of the solar system in order.",
    "Summarise in one sentence: The mill stood by the river until a flood carried it away.",
    "What are prime numbers? Give five of them.",
    "Write a Python function that returns the larger of two numbers.",
    "A shirt costs 20 euros and is sold for a quarter less. What is the new price?",
    "Tell the beginning of a story about a lighthouse keeper.",
    "What should I do if I have lost my passport abroad?",
    "Give me three synonyms of the word happy.",
    "Why do leaves change their colour in autumn?",
    "Describe how to plant a tree, step by step.",
    "What happened in the year 1969 on the moon?",
    "Correct the sentence: She don't likes apples.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Invent a name for a small bookshop and say why it fits.",
    "What does a heart do in the body?",
    "Compare tea and coffee in two sentences.",
    "How do I find the area of a triangle?",
    "Write down a recipe for a simple tomato soup.",
    "What is inflation, in plain words?",
    "Give advice to somebody who sleeps badly.",
    "Name one advantage and one drawback of living in a city.",
    "How many days does a leap year have, and when is the next one after 2024?",
    "Describe a thunderstorm without using the word rain.",
)
# What a file's texts are cut to, in characters, and how many of them are asked.
_LONGEST, _MOST = 2000, 64


class _FirstQuestion:
    """Stands for a tokenizer: of a conversation, what the user says first is asked."""

    chat_template, bos_token = "any", None

    def apply_chat_template(self, messages: Iterable[Mapping[str, str]], tokenize: bool) -> str:
        """Return the first message of the user, "" where there is none."""
        said = (item["content"] for item in messages if item["role"] == "user")
        return next(said, "")


def read_questions(
    spec: str, field: str | None = None, split: str | None = None, most: int = _MOST
) -> list[str]:
    """Return the first texts of a file or hub data set, as what is asked.

    Args:
        spec: As in `load_texts`; of conversations the user's first message is taken.
        field: As there.
        split: As there.
        most: How many, at most; each is cut to 2000 characters.

    Raises:
        SourceError: There is no text; see also `load_texts`.
    """
    tokenizer: Any = _FirstQuestion()
    texts = (text.strip()[:_LONGEST] for text in load_texts(spec, field, split, tokenizer))
    found = list(islice(filter(None, texts), most))
    if not found:
        raise SourceError(f"expected texts to ask in {spec!r}, got none: give a file that has some")
    return found
