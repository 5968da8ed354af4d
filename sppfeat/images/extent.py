"""What sources were listed: which names they would have given, and which of those have certainly lost their file."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sppfeat.images.archives import places_within
from sppfeat.images.items import name_to_path
from sppfeat.images.urls import is_url


@dataclass(frozen=True)
class Extent:
    """The names that sources stand for as a whole; single images and lists stand for none.

    root: what names are relative to. whole: what the names begin with of everything below the folders, prefixes and
    archives. unlisted: likewise, of those among them that gave no image, as a disk does that is not mounted, or that
    could not be read to the end. unread: how many images are of kinds that are not read, by extension.
    """

    root: str
    whole: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    unread: tuple[tuple[str, int], ...] = ()

    def lost(self, name: str) -> bool:
        """Whether an image that was not listed is certainly gone from these sources."""
        if not name.startswith(self.whole) or name.startswith(self.unlisted):
            return False
        # Of a bucket or an archive the listing says it; of a folder, which may hold archives, the file system.
        listed = is_url(self.root) or any(f"{archive}/" in self.whole for archive in places_within(name))
        return listed or is_lost(self.root, name)

    def below(self, prefix: str, root: str) -> Extent:
        """The same, named from a folder further up. prefix: the way there, with a slash at its end."""
        whole, unlisted = (tuple(prefix + start for start in starts) for starts in (self.whole, self.unlisted))
        return Extent(root, whole, unlisted, self.unread)


def is_lost(root: str, name: str) -> bool:
    """Whether the file that a name stands for certainly does not exist; nothing is opened.

    It may exist where its folder cannot be read, or is behind a link that leads nowhere: its disk may not be mounted.
    What is behind a URL is taken to exist, and so is a member whose archive exists.
    """
    if is_url(root):
        return False
    path = name_to_path(root, name)
    try:
        os.lstat(path)
        return False
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError):  # ValueError: a path that is invalid on this system
        return False
    if any(os.path.isfile(name_to_path(root, archive)) for archive in places_within(name)):
        return False
    folder = os.path.dirname(path)
    while len(folder) > len(root) and not os.path.isdir(folder):
        if os.path.islink(folder):
            return False
        folder = os.path.dirname(folder)
    return True
