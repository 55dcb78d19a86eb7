"""What systems and file managers leave in folders beside a user's own files."""

from collections.abc import Iterable

SYSTEM = {
    # folders of macOS, Synology, QNAP, Windows, ext4, Python
    *("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    *("$recycle.bin", "system volume information", "lost+found", "__pycache__"),
    # files of Windows, and of readers of LMDB
    *("thumbs.db", "desktop.ini", "lock.mdb"),
}


def is_kept(parts: Iterable[str]) -> bool:
    """Whether a path inside a source is the user's: neither hidden nor made by a system."""
    return not any(part.startswith(".") or part.lower() in SYSTEM for part in parts)
