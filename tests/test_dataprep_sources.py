"""Listing and reading sources: folders, zip files, tar files of tar files."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from dataprep.manifest import DataError
from dataprep.sources import Reader, SourceChanged, Unreadable, list_source
from dataprep.synthetic import write_class_folders, write_random_images


def contents(listing) -> dict[str, bytes]:
    reader = Reader(listing)
    data = {name: reader.read(index) for index, name in enumerate(listing.names)}
    reader.close()
    return data


def nested_tar(root: Path, path: Path) -> None:
    """Pack class folders as ILSVRC2012_img_train.tar is packed."""
    with tarfile.open(path, "w") as outer:
        for folder in sorted(root.iterdir()):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for file in sorted(folder.iterdir()):
                    archive.add(file, file.name)
            info = tarfile.TarInfo(f"{folder.name}.tar")
            info.size = len(inner.getvalue())
            outer.addfile(info, io.BytesIO(inner.getvalue()))


def test_imagenet_folder_and_nested_tar_are_the_same(tmp_path):
    write_class_folders(tmp_path / "train", classes=3, per_class=4)
    nested_tar(tmp_path / "train", tmp_path / "ILSVRC2012_img_train.tar")
    folder = list_source("imagenet", tmp_path, "train")
    archive = list_source("imagenet", tmp_path / "ILSVRC2012_img_train.tar", "train")
    assert folder.classes == archive.classes == ("class_0", "class_1", "class_2")
    assert (
        folder.table["label"].tolist() == archive.table["label"].tolist() == sorted([0, 1, 2] * 4)
    )
    assert contents(folder) == contents(archive)
    (tmp_path / "train").rename(tmp_path / "other")
    assert list_source("imagenet", tmp_path, "train").names == folder.names  # finds the archive


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_coco_folder_and_zip_are_the_same(tmp_path, method):
    paths = write_random_images(tmp_path / "train2017", 5)
    with zipfile.ZipFile(tmp_path / "train2017.zip", "w", method) as archive:
        for path in reversed(paths):
            archive.write(path, f"train2017/{path.name}")
        archive.writestr("__MACOSX/._x.jpg", b"")
        archive.writestr("train2017/notes.md", b"text")
    folder = list_source("coco", tmp_path, "train2017")
    packed = list_source("coco", tmp_path / "train2017.zip", "train2017")
    assert contents(folder) == contents(packed)
    assert packed.skipped == [("train2017/notes.md", "no image extension, and no image inside")]
    assert set(packed.table["label"].tolist()) == {-1}
    with pytest.raises(DataError, match=r"no files below 'val2017' \(it has __MACOSX, train2017\)"):
        list_source("coco", tmp_path / "train2017.zip", "val2017")


def test_order_is_by_path_bytes_and_names_are_kept(tmp_path):
    names = ["b.jpg", "B.jpg", "a b.jpg", "a/z.jpg", "a-.jpg", "ä.jpg", "-x.jpg", "10.jpg", "9.JPG"]
    (picture,) = write_random_images(tmp_path / "made", 1)
    for name in names:
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_bytes(picture.read_bytes())
    raw = os.fsencode(tmp_path / "all") + b"/\xff.jpg"  # a name that is no text
    Path(os.fsdecode(raw)).write_bytes(picture.read_bytes())
    listing = list_source("folder", tmp_path / "all", "")
    assert listing.names == sorted([*names, "\udcff.jpg"], key=os.fsencode)
    assert set(contents(listing).values()) == {picture.read_bytes()}


def test_what_is_no_image_is_left_out_with_a_reason(tmp_path):
    root = tmp_path / "all"
    (picture,) = write_random_images(root, 1)
    (root / "sub").mkdir()
    (root / ".git").mkdir()
    (root / "._000000.jpg").write_bytes(b"junk")
    (root / "readme").write_text("text")
    (root / "bare").write_bytes(picture.read_bytes())
    (root / "sub" / "loop").symlink_to(root)
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "linked.jpg").symlink_to(picture)
    os.mkfifo(root / "pipe.jpg")
    listing = list_source("folder", root, "")
    assert listing.names == ["000000.jpg", "bare", "linked.jpg"]
    assert dict(listing.skipped) == {
        "._000000.jpg": "hidden",
        ".git": "hidden",
        "gone.jpg": "cannot be reached: No such file or directory",
        "pipe.jpg": "not a regular file",
        "readme": "no image extension, and no image inside",
        "sub/loop": "a link to a folder above it",
    }


def test_labels_of_folders(tmp_path):
    write_class_folders(tmp_path / "two", classes=2, per_class=2)
    assert list_source("folder", tmp_path / "two", "").table["label"].tolist() == [0, 0, 1, 1]
    write_class_folders(tmp_path / "one", classes=1, per_class=2)
    assert list_source("folder", tmp_path / "one", "").classes == ()
    assert list_source("imagenet", tmp_path / "one", "").classes == ("class_0",)
    write_random_images(tmp_path / "two", 1)
    assert set(list_source("folder", tmp_path / "two", "").table["label"].tolist()) == {-1}
    with pytest.raises(DataError, match=r"000000\.jpg lies in no class folder"):
        list_source("imagenet", tmp_path / "two", "")


def test_what_cannot_be_a_source(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in it"):
        list_source("folder", tmp_path / "empty", "")
    with pytest.raises(DataError, match="no such folder"):
        list_source("coco", tmp_path / "nowhere", "train2017")
    with pytest.raises(DataError, match=r"no 'train2017' in it \(it has empty\)"):
        list_source("coco", tmp_path, "train2017")
    for name, kind in (("a.zip", "zip"), ("a.tar", "tar")):
        (tmp_path / name).write_bytes(b"not an archive" * 100)
        with pytest.raises(DataError, match=f"not readable as an? .*{kind}"):
            list_source("coco", tmp_path / name, "train2017")
    with pytest.raises(DataError, match="not a folder"):
        (tmp_path / "x.rar").write_bytes(b"")
        list_source("coco", tmp_path / "x.rar", "train2017")


def test_names_in_archives_are_only_ids(tmp_path):
    (picture,) = write_random_images(tmp_path / "made", 1)
    data = picture.read_bytes()
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name in ("../../up.jpg", "/etc/absolute.jpg", "twice.jpg", "twice.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    listing = list_source("folder", tmp_path / "evil.tar", "")
    assert contents(listing).keys() == {"/etc/absolute.jpg", "twice.jpg"}
    assert ("link.jpg", "a link or special file within an archive") in listing.skipped
    assert ("twice.jpg", "replaced by a later member") in listing.skipped
    assert ("../../up.jpg", "hidden") in listing.skipped


def test_a_source_that_changes_is_noticed(tmp_path):
    paths = write_random_images(tmp_path / "all", 3)
    listing = list_source("folder", tmp_path / "all", "")
    reader = Reader(listing)
    paths[0].write_bytes(b"shorter")
    paths[1].unlink()
    for index in (0, 1):
        with pytest.raises(SourceChanged, match="changed while it was being converted"):
            reader.read(index)
    assert reader.read(2) == paths[2].read_bytes()
    assert listing.digest() != list_source("folder", tmp_path / "all", "").digest()


def test_a_damaged_zip_member_is_refused(tmp_path):
    paths = write_random_images(tmp_path / "train2017", 2)
    zipped = tmp_path / "train2017.zip"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.write(path, f"train2017/{path.name}")
    data = bytearray(zipped.read_bytes())
    data[600] ^= 255
    zipped.write_bytes(data)
    reader = Reader(list_source("coco", zipped, "train2017"))
    with pytest.raises(Unreadable):
        reader.read(0)
    assert reader.read(1) == paths[1].read_bytes()
    reader.close()
