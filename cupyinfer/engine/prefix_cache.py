"""Prefix caching: full pages found again by the hash of all tokens up to their end.

The key of page ``i`` of a sequence is ``blake2b(key of page i-1, tokens of page i)``, 128 bits: equal keys mean equal
token prefixes (a collision is as likely as guessing a 128-bit number), so the keys and values in the page are the ones
that the new sequence would compute. Pages that nobody holds stay until the ledger needs them, oldest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from cupyinfer.engine.sequence import Sequence
from cupyinfer.runtime.ledger import BlockLedger

_ROOT = b"cupyinfer prefix"


@dataclass(slots=True)
class PrefixStats:
    """Totals since the engine started, in tokens and pages."""

    queried_tokens: int = 0
    hit_tokens: int = 0
    evicted_pages: int = 0


class PrefixCache:
    """Content index of a ledger's pages. ``enabled=False`` finds nothing and remembers nothing."""

    def __init__(self, ledger: BlockLedger, block_size: int, enabled: bool = True) -> None:
        self.ledger = ledger
        self.block_size = block_size
        self.enabled = enabled
        self.stats = PrefixStats()
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        ledger.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._page_of)

    def match(self, sequence: Sequence) -> list[int]:
        """Pages that hold the beginning of the sequence; they are not yet held by it (see ``BlockLedger.share``).

        At least one token is left to compute, whatever was found: its logits are needed.
        """
        if not self.enabled or sequence.wants_prompt_logprobs:
            return []
        pages = []
        for i in range((len(sequence.tokens) - 1) // self.block_size):
            page = self._page_of.get(self._key(sequence, i))
            if page is None:
                break
            pages.append(page)
        return pages

    def record(self, queried: int, hit: int) -> None:
        """Count one lookup that led to an admission."""
        self.stats.queried_tokens += queried
        self.stats.hit_tokens += hit

    def register(self, sequence: Sequence) -> None:
        """Remember the sequence's pages that are full of known, computed tokens. A content known already is skipped."""
        if not self.enabled:
            sequence.register_at = 1 << 62
            return
        first = sequence.register_at // self.block_size - 1
        full = min(len(sequence.tokens), sequence.computed) // self.block_size
        for i in range(first, full):
            key, page = self._key(sequence, i), sequence.pages[i]
            if key not in self._page_of:
                self._page_of[key] = page
                self._key_of[page] = key
                self.ledger.keep(page)
        sequence.register_at = (max(first, full) + 1) * self.block_size

    def clear(self) -> int:
        """Forget every page that nobody holds; returns how many."""
        return self.ledger.drop_cached()

    def apply_moves(self, moves: Mapping[int, int]) -> None:
        """Pages were renumbered by compaction."""
        self._key_of = {moves.get(page, page): key for page, key in self._key_of.items()}
        self._page_of = {key: page for page, key in self._key_of.items()}

    def check(self) -> None:
        """Raise AssertionError unless both maps agree with each other and with the ledger."""
        assert {v: k for k, v in self._key_of.items()} == self._page_of, "the two maps differ"
        kept = {page for page in range(self.ledger.num_pages) if self.ledger.is_kept(page)}
        assert kept == set(self._key_of), "kept pages and remembered pages differ"

    def _key(self, sequence: Sequence, i: int) -> bytes:
        """The key of page ``i``; keys before it are computed on the way and kept with the sequence."""
        keys, size = sequence.hashes, self.block_size
        while len(keys) <= i:
            start = len(keys) * size
            parent = keys[-1] if keys else _ROOT
            digest = blake2b(parent, digest_size=16)
            digest.update(sequence.tokens[start : start + size].tobytes())
            keys.append(digest.digest())
        return keys[i]

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
        self.stats.evicted_pages += 1


def held_pages(sequences: Iterable[Sequence]) -> list[int]:
    """Every page of the sequences, once for each holder (for ``BlockLedger.check``)."""
    return [page for sequence in sequences for page in sequence.pages]
