"""LSUN: an exported image folder, or the published LMDB where the package lmdb is installed."""

from pathlib import Path
from typing import Any

from study.data.sources.base import Item, Source, Unusable, decode
from study.data.sources.tree import open_tree
from study.data.sources.trees import image_source, is_image
from study.files import UserError


def lsun(settings: dict[str, Any], path: Path) -> Source:
    """One LSUN category, without labels; the path already names category and split."""
    if path.is_dir() and (path / "data.mdb").is_file():
        return _database(path)
    tree = open_tree(path)
    try:
        if any(member.rpartition("/")[2] == "data.mdb" for member in tree.members):
            raise UserError(
                f"{path}: holds an LMDB (data.mdb): unpack it and point the path at the folder "
                "with data.mdb"
            )
        items = [Item(member, None, member) for member in filter(is_image, tree.members)]
        return image_source(tree, items, "LSUN")
    except BaseException:
        tree.close()
        raise


def _database(path: Path) -> Source:
    try:
        import lmdb
    except ImportError:
        raise UserError(
            f"{path}: reading LSUN's LMDB needs the package lmdb: install it, or export the "
            "images to a folder"
        ) from None
    try:
        database = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        with database.begin() as transaction, transaction.cursor() as cursor:
            keys = list(cursor.iternext(keys=True, values=False))
    except lmdb.Error as error:
        raise UserError(f"{path}: not a readable LMDB ({error})") from None
    if not keys:
        database.close()
        raise UserError(f"{path}: the LMDB is empty")

    def read(item: Item) -> tuple[Any, None]:
        # A transaction belongs to one thread, so each read has its own; they are cheap.
        with database.begin() as transaction:
            data = transaction.get(item.key)
        if data is None:
            raise Unusable("unreadable", "the entry is gone")
        return decode(data), None

    items = [Item(key.decode("ascii", "backslashreplace"), None, key) for key in keys]
    return Source(items=items, read=read, description="LSUN, LMDB", close=database.close)
