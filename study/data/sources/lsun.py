"""LSUN: an exported image folder, or the published LMDB."""

from pathlib import Path

from study.data.pixels import Unusable, decode
from study.data.sources.base import Item, Source
from study.data.sources.lmdb import Database
from study.data.sources.tree import open_tree
from study.data.sources.trees import image_source, is_image
from study.files import UserError


def lsun(settings: dict[str, object], path: Path) -> Source:
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
        database = Database(path / "data.mdb")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable LMDB ({error})") from None
    if not database.places:
        database.close()
        raise UserError(f"{path}: the LMDB is empty")

    def read(item: Item) -> tuple[object, None]:
        try:
            return decode(database.read(item.key)), None
        except (OSError, ValueError) as error:
            raise Unusable("unreadable", str(error)) from None

    items = [
        Item(key.decode("ascii", "backslashreplace"), None, place) for key, place in database.places
    ]
    database.places.clear()
    return Source(
        items=items,
        read=read,
        description="LSUN, LMDB",
        close=database.close,
        labelling="none: this source has none",
    )
