"""Which code made a result: the version, and a hash of the source."""

from __future__ import annotations

import hashlib
from pathlib import Path

from robustknn._version import __version__


def code_fingerprint() -> str:
    """The version and a sha256 of the package's source files, without those that only show or start a run."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in ("adapters", "cli", "reports", "reproduce"):
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:16]}"
