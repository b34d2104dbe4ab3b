"""Stop strings: end a text where one of them appears, even when it is spread over several tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Watches the text of one sequence for stop strings, holding back what may be the beginning of one.

    The result does not depend on how the text is cut into pieces: the stop string that is complete first wins; of two
    that end at the same character, the longer one.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include_stop
        self._held = ""
        self._longest = max(map(len, self._stop), default=0)

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """(text that may be shown now, the stop string that ended the sequence or None).

        While ``armed`` is False (fewer than min_tokens so far) complete stop strings pass as ordinary text; one that
        becomes complete later still counts.
        """
        if not self._stop:
            return text, None
        before = len(self._held)
        buffer = self._held + text
        found = self._find(buffer, before) if armed and text else None
        if found is not None:
            begin, stop = found
            self._held = ""
            return buffer[: begin + len(stop)] if self._include else buffer[:begin], stop
        keep = self._possible_start(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def flush(self) -> str:
        """What is held back, when the sequence ends for another reason."""
        held, self._held = self._held, ""
        return held

    def _find(self, buffer: str, seen: int) -> tuple[int, str] | None:
        """The first stop string to become complete after ``seen`` characters: (where it begins, the string)."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            begin = buffer.find(stop, max(seen - len(stop) + 1, 0))
            if begin >= 0 and (best is None or (begin + len(stop), begin) < best[:2]):
                best = (begin + len(stop), begin, stop)
        return best and (best[1], best[2])

    def _possible_start(self, buffer: str) -> int:
        """Length of the longest end of ``buffer`` that begins some stop string."""
        for length in range(min(len(buffer), self._longest - 1), 0, -1):
            end = buffer[len(buffer) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0
