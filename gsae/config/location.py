"""Where a store may be. In: what stands in harvest.store or on the command line. Out: whether it is a URL, or a `ConfigError`."""

import re
from urllib.parse import urlsplit

from gsae.config.rules import require

REMOTE_SCHEMES = ("s3", "gs", "https", "http")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def is_remote(location: str, setting: str) -> bool:
    """Whether a store is at a URL; otherwise it is in a directory.

    Args:
        location: a path, or a URL that begins with one of REMOTE_SCHEMES.
        setting: the name by which messages call it.

    Raises:
        ConfigError: it begins with another scheme, or is a URL that cannot be that of a directory.
    """
    scheme = _SCHEME.match(location)
    if scheme is None:
        return False
    places = ", ".join(f"{name}://" for name in REMOTE_SCHEMES)
    require(
        location.startswith(tuple(f"{name}://" for name in REMOTE_SCHEMES)),
        f"{setting} begins with {scheme[0]}, from which gsae reads nothing; give a directory (./{location} if that is its name), "
        f"or a URL with one of {places}",
    )
    url = urlsplit(location)
    require("@" not in url.netloc, f"{setting} has a user or password in its URL; leave them out, docs/remote.md says where they belong")
    require(
        bool(url.netloc) and not (url.query or url.fragment),
        f"{setting} is {location}; give the URL of a directory, with a host or bucket and without ? and #",
    )
    return True
