"""What may be kept of what a model wrote: no copy of what it was shown, no near-duplicate of what is known, no scraps.

In: a text, the spans that its prompt showed, the texts that are known. Out: the reason why it is dropped, or None.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import xxhash

# Scripts that set no spaces between words count by character.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+")
_TALK = re.compile(
    r"<<|>>|\bthe pattern\b|\b(?:new|another|next) (?:sample|entry|example) (?:of|in|for|that)\b|\btexts above\b|"
    r"\bnumbered list\b|\btraining (?:data|sample)s? (?:is|are|for) |\bas an ai\b|\Ahere(?:'s|’s| is| are) "
    r"(?:an?|the|some|another|one)\b[^.?!\n]{0,60}:|\A(?:sure|certainly|of course)[,!]",
    re.IGNORECASE,
)
_SCRAP = re.compile(r"\A[,;:.?!)\]}»”…-]|[,;:([{«“]\Z|\b(?:and|or|the|a|an|of|to|with|for|in)\Z", re.IGNORECASE)
_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|[。！？]|\n")
_FEWEST_WORDS = 3
_DISTINCT, _LOOP_WORDS = 0.6, 40  # of a text's words so many must differ (of a long text's: of 40)
_SHINGLE = 5  # characters
_HASHES = 128  # of a text's MinHash


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def copied_run(text: str, shown: Iterable[str]) -> int:
    """Returns the most consecutive words that the text shares with one of those shown."""
    ours, longest = words(text), 0
    for other in shown:
        theirs = words(other)
        match = SequenceMatcher(None, ours, theirs, autojunk=False).find_longest_match()
        longest = max(longest, match.size)
    return longest


def unfit(text: str) -> str | None:
    """Returns why a text is no sample: a fragment, a loop, or talk about the request; None where nothing is wrong."""
    found = words(text)
    if len(found) < _FEWEST_WORDS or _SCRAP.search(text.strip()):
        return "fragment"
    if len(set(found)) < _DISTINCT * min(len(found), _LOOP_WORDS):
        return "loop"
    return "talk about the request" if _TALK.search(text) else None


def whole_sentences(text: str) -> str:
    """Returns the text to the end of its last whole sentence, "" where none ends."""
    ends = [match.end() for match in _END.finditer(text)]
    return text[: ends[-1]].rstrip() if ends else ""


class NearDuplicates:
    """Texts that are known, by where they are from, and whether another is nearly one of them.

    Two texts are near-duplicates when their sets of 5 consecutive characters (in lower case, runs of white space as
    one) overlap by `threshold` (Jaccard); MinHash (Broder 1997) finds the few that are compared.
    """

    def __init__(self, known: Mapping[str, Iterable[str]] | None = None, *, threshold: float = 0.7) -> None:
        from datasketch import MinHashLSH

        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; it must be above 0 and at most 1.")
        self.threshold = threshold
        # A lower threshold here: what is missed here is never compared. MinHashLSH only says how many bands of how many
        # hashes are best: its own tables take four times the memory of ours.
        best = MinHashLSH(threshold=0.8 * threshold, num_perm=_HASHES)
        self._bands, self._rows = best.b, best.r
        self._latest: dict[int, int] = {}  # by a band's key: the latest text that has it
        self._before = array("i")  # [texts * bands]: the text before it that has the same key, or -1
        self._known: list[tuple[str, str]] = []
        for source, texts in (known or {}).items():
            for text in texts:
                self.add(text, source)

    def add(self, text: str, source: str) -> None:
        shingles = _shingles(text)
        if shingles:
            number = len(self._known)  # one object for all bands
            for key in self._keys(shingles):
                self._before.append(self._latest.get(key, -1))
                self._latest[key] = number
            self._known.append((source, text))

    def source_of(self, text: str) -> str | None:
        """Returns where a near-duplicate of the text is from, None where there is none."""
        ours = _shingles(text)
        if not ours:
            return None
        for number in sorted(self._candidates(ours)):
            source, known = self._known[number]
            theirs = _shingles(known)
            shared = len(ours & theirs)
            if shared >= self.threshold * (len(ours) + len(theirs) - shared):
                return source
        return None

    def _candidates(self, shingles: frozenset[str]) -> set[int]:
        found = set()
        for band, key in enumerate(self._keys(shingles)):
            number = self._latest.get(key, -1)
            while number >= 0:
                found.add(number)
                number = self._before[number * self._bands + band]
        return found

    def _keys(self, shingles: frozenset[str]) -> list[int]:
        """A key a band: equal where all of the band's hashes are."""
        bands = _minhash(shingles)[: self._bands * self._rows].reshape(self._bands, self._rows)
        return [xxhash.xxh3_64_intdigest(hashes.tobytes(), seed=band) for band, hashes in enumerate(bands)]


def texts_of(rows: Iterable[Any]) -> Iterator[str]:
    """Yields the texts of rows of any type: strings, and the contents of messages."""
    for row in rows:
        values = (
            [value for name, value in row.items() if not name.startswith("fac_")] if isinstance(row, dict) else [row]
        )
        for value in values:
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield from (m["content"] for m in value if isinstance(m, dict) and isinstance(m.get("content"), str))


def _shingles(text: str) -> frozenset[str]:
    text = " ".join(text.casefold().split())
    return frozenset(text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1))) if text else frozenset()


def _minhash(shingles: frozenset[str]) -> np.ndarray:
    from datasketch import MinHash

    found = MinHash(num_perm=_HASHES)
    found.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles])
    return found.hashvalues
