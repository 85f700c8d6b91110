"""Bounded exponential backoff with jitter, for requests that a busy table answered only in part.

attempt    0       1             2            ...  6            7            then
pause      none    0.05-0.1 s    0.1-0.2 s    ...  1.6-3.2 s    2.5-5 s      the caller gives up
"""

import random
import time

MAX_ATTEMPTS = 8
"""Attempts before a caller gives up; their pauses add up to 6 to 11 s."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0


def pause_before(attempt: int) -> None:
    """Wait before an attempt, which is 0 for the first; the first attempt does not wait."""
    if attempt:
        longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
        # Jitter, so that several writers do not all return at the same moment.
        _sleep(random.uniform(longest_s / 2, longest_s))


def _sleep(seconds: float) -> None:
    time.sleep(seconds)
