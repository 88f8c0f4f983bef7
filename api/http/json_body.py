"""`parse_object`: the bytes of a request's body as one JSON object, or a 400 that says what is wrong with them.

Stricter than `json.loads`: UTF-8 only, no name twice in one object, no NaN or Infinity, no number that overflows, and
bounded depth and work.
"""

from __future__ import annotations

import json
import math
from typing import Any

from api.errors import BadRequestError, shorten


class _Refused(ValueError):
    """What the parser's hooks raise; the message is for the client."""


def parse_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """Raises BadRequestError (invalid_json). Lone surrogates pass; those who use a text check it."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(f"the body is not UTF-8 at byte {error.start}") from error
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _bad(f"{error.msg} at character {error.pos}") from error
    except _Refused as error:
        raise _bad(str(error)) from error
    except RecursionError as error:
        raise _bad(f"nested deeper than {max_depth} levels") from error
    except ValueError as error:  # Python's own bound on the digits of an integer
        raise _bad("a number has too many digits") from error
    if not isinstance(value, dict):
        raise _bad("the body must be a JSON object")
    # Only a body of many brackets can be deep: the usual one is not walked through.
    if body.count(b"[") + body.count(b"{") > max_depth and _depth_exceeds(value, max_depth):
        raise _bad(f"nested deeper than {max_depth} levels")
    return value


def _bad(what: str) -> BadRequestError:
    return BadRequestError(f"The request cannot be read: {what}.", code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _Refused(f"the name {shorten(name)} stands twice in one object")
    return unique


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _Refused(f"the number {shorten(digits)} is too large")
    return number


def _constant(name: str) -> float:
    raise _Refused(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_constant)


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        inside = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
        level = [item for item in inside if isinstance(item, (dict, list))]
        if not level:
            return False
    return True
