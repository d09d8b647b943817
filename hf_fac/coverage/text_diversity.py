"""Lexical and syntactic diversity of texts: distinct n-grams, n-gram entropy, parts of speech.

In: texts as lists of words (`words`) or of parts of speech (`parts_of_speech`). Out: numbers. Each grows with the
number of different words and shrinks or grows with the size of the set: compare sets of the same size and length.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

INSTALL = "pip install 'hf-fac[metrics]'"
_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Returns the words of a text and its punctuation marks, one character each; a script without spaces has few."""
    return _WORD.findall(text)


def parts_of_speech(texts: Iterable[Sequence[str]]) -> list[list[str]]:
    """Returns the part of speech of each word, by HanTa's tagger for English (tags of the British National Corpus).

    Raises: ImportError where HanTa is not installed.
    """
    try:
        import HanTa
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError as error:
        raise ImportError(f"parts of speech need HanTa: {INSTALL}") from error
    # A bare file name would be looked for in the working directory first.
    tagger = HanoverTagger(str(Path(HanTa.__file__).parent / "morphmodel_en.pgz"))
    return [tagger.tag_sent(list(text), taglevel=0) for text in texts]


def distinct(texts: Iterable[Sequence[str]], n: int) -> float:
    """Returns distinct-n: different n-grams per n-gram of all texts (Li et al. 2016, arXiv 1510.03055).

    An n-gram lies within one text. NaN where no text has one.
    """
    counts = _ngrams(texts, n)
    return len(counts) / (counts.total() or math.nan)


def ngram_entropy(texts: Iterable[Sequence[str]], n: int) -> float:
    """Returns the Shannon entropy, in nats, of the n-grams of all texts (Ent-n of Zhang et al. 2018, arXiv 1809.05972).

    NaN where no text has one.
    """
    counts = _ngrams(texts, n)
    total = counts.total()
    if not total:
        return math.nan
    return math.fsum(-count / total * math.log(count / total) for count in counts.values())


def _ngrams(texts: Iterable[Sequence[str]], n: int) -> Counter[tuple[str, ...]]:
    return Counter(chain.from_iterable(zip(*(text[start:] for start in range(n)), strict=False) for text in texts))
