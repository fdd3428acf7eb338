"""Text on which tokenizers that split it in different ways give different tokens."""

from __future__ import annotations

import random

HARD_TEXTS = (
    "Hello, world! It's 3.14159 or 1234567890; 12 345 007 and 1,000,000.",
    "I'LL don't we'Ve IT'S they're l'été 'tis O'Neill's 'd",
    "def f(x):\n        return x**2  # a comment\n\n\n\tif (a!=b) {\r\n\r\n  }\r",
    "größer naïve Ångström ŒUVRE Straße ИВАН Привет, мир! Ελληνικά עברית العربية हिन्दी ไทยภาษา",
    "你好，世界。日本語のテキスト、カタカナ 한국어 텍스트 tiếng Việt",
    "🤗🚀 👩‍👩‍👧 🇩🇪 ♥️ ∑∫√ ← →",
    "CamelCase snake_case HTTPServer McDonald iPhone fooBAR ABCdef x2y3",
    " leading,  two   three    spaces and trailing   ",
    "\n\n \n\t \n  x\n\n",
    "a\u00a0b\u2003c\u3000d\u200be",
    "http://example.com/path?q=1&r=%20#x user@host.org ½ ² ① Ⅷ ١٢٣ ४५",
    "$100 €5 a+b=c [INST] ... --- !!! ?! \"quote\" 'single' `code` /* x */ //",
)
"""In Unicode's composed form (NFC): llama.cpp does not compose letters, whatever the tokenizer does first."""

MIXED_TEXTS = 64
FRAGMENTS_EACH = 24


def hard_texts(special: list[str]) -> list[str]:
    """The texts, fragments of them in random order, and the tokens ``special`` between words."""
    fragments = [word for text in HARD_TEXTS for word in text.split(" ")]
    fragments += [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "'s", "'LL", "1", "23", "456", "7890", ".", "!?", "_"]
    chance = random.Random(0)
    mixed = []
    for _ in range(MIXED_TEXTS):
        mixed.append("".join(chance.choice(fragments) for _ in range(FRAGMENTS_EACH)))
    marked = [f"one {token}two{token}\n{token} 3" for token in special]
    return [*HARD_TEXTS, *mixed, *marked]
