"""What Kubernetes takes as names, labels and environment variables: types for the fields of a config.

The API server refuses the others when a pod is made, which is hours after a file was written.
"""

import re
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"  # of RFC 1123
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"


def _matching(pattern: str, what: str, longest: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text) or len(text) > longest:
            raise ValueError(f"'{text}' is {what}, at most {longest} characters")
        return text

    return check


ObjectName = Annotated[
    str, AfterValidator(_matching(SUBDOMAIN, "no name of an object: lower case, digits, '-' and '.'", 253))
]
# Of a label, an annotation, a taint or a resource.
Key = Annotated[
    str,
    AfterValidator(
        _matching(rf"(?=[^/]{{1,253}}(/|$))({SUBDOMAIN}/)?{_WORD}", "no key: a word, or a domain, '/' and a word", 317)
    ),
]
LabelValue = Annotated[
    str, AfterValidator(_matching(rf"({_WORD})?", "no value of a label: letters, digits, '-', '_' and '.'", 63))
]
Variable = Annotated[
    str, AfterValidator(_matching("[A-Za-z_][A-Za-z0-9_]*", "no environment variable: letters, digits and '_'", 253))
]
DataKey = Annotated[  # of a secret or a config map
    str, AfterValidator(_matching(r"[-A-Za-z0-9_.]+", "no key: letters, digits, '-', '_' and '.'", 253))
]
