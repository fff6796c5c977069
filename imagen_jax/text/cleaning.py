"""Captions as DeepFloyd IF was trained on them: with the remains of web pages removed, twice.

The rules and their order are those of diffusers' `IFPipeline._clean_caption`, mistakes included:
another caption is another picture. They need the extra `captions` (beautifulsoup4, ftfy); without
it captions are lower-cased and trimmed, as in diffusers.
"""

import functools
import html
import importlib.util
import re
import urllib.parse
from collections.abc import Iterable

NEEDED = ("bs4", "ftfy")

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    r"\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0"
    r"\uFE31\uFE32\uFE58\uFE63\uFF0D"
)

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*rules: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), new) for pattern, new in rules)


_LINKS = _rules(
    ("<person>", "person"),
    *(
        (
            rf"\b((?:{scheme}:(?:\/{{1,3}}|[a-zA-Z0-9%])"
            rf"|[a-zA-Z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b\/?(?!@)))",
            "",
        )
        for scheme in ("https?", "www")
    ),
)
_MARKS = _rules(
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # Chinese and Japanese, from strokes to unified ideographs
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),  # article numbers
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINED = re.compile("[-_]")  # in place of spaces, if there are many
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # product names
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes, with a Latin or a Cyrillic x
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,:;-]", ""),
    (r"['_,:+-]$", ""),
    (r"^\.\S+$", ""),
)


def clean(caption: str) -> str:
    """The caption as IF's text encoder should read it; it may be empty."""
    if not can_clean():
        return caption.lower().strip()
    return _once(_once(caption))


@functools.cache
def can_clean() -> bool:
    """Whether the extra `captions` is installed."""
    return all(importlib.util.find_spec(name) for name in NEEDED)


def _once(caption: str) -> str:
    import ftfy
    from bs4 import BeautifulSoup

    caption = urllib.parse.unquote_plus(caption).strip().lower()
    caption = BeautifulSoup(_apply(_LINKS, caption), features="html.parser").text
    caption = _apply(_MARKS, caption)
    if len(_JOINED.findall(caption)) > 3:
        caption = _JOINED.sub(" ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return _apply(_WORDS, caption).strip()


def _apply(rules: Iterable[tuple[re.Pattern[str], str]], caption: str) -> str:
    for pattern, new in rules:
        caption = pattern.sub(new, caption)
    return caption
