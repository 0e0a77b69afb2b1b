import builtins
import sys
from pathlib import Path

import pytest
import torch

from bayesprune.app.data import images as reading
from bayesprune.app.data.images import Data, load_data

CLASSES = ("cat", "dog", "owl")


def write_images(folder: Path, classes=CLASSES, count: int = 20) -> None:
    """`count` flat images of 12 x 10 pixels per class; the red channel is 40 x the class, the green one counts."""
    image = pytest.importorskip("PIL.Image", reason="Pillow comes with the timm extra")
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image.new("RGB", (12, 10), (40 * label, number, 0)).save(folder / name / f"{number:03}.png")


def everything(loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def rows(data: Data, name: str) -> set[bytes]:
    return {image.numpy().tobytes() for image in everything(getattr(data, name))[0]}


@pytest.fixture(scope="module")
def digits() -> Data:
    pytest.importorskip("sklearn")
    return load_data("digits", batch_size=1078)


def test_digits_sizes(digits):
    assert [len(loader.dataset) for loader in (digits.train, digits.validation, digits.test)] == [1077, 360, 360]
    assert (digits.num_data, digits.num_classes, digits.in_chans, digits.input_size) == (1077, 10, 1, (1, 32, 32))
    images, labels = everything(digits.train)
    assert images.shape == (1077, 1, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert "1,077 training" in digits.description


def test_digits_are_normalised_by_the_training_split(digits):
    images, _ = everything(digits.train)
    assert images.mean().abs() < 1e-5
    assert (images.std() - 1).abs() < 1e-5


def test_digits_splits_are_stratified_and_disjoint(digits):
    fractions = [
        torch.bincount(everything(loader)[1], minlength=10) / len(loader.dataset)
        for loader in (digits.train, digits.validation, digits.test)
    ]
    assert max((fractions[0] - other).abs().max() for other in fractions[1:]) < 0.005
    assert rows(digits, "train").isdisjoint(rows(digits, "test"))
    assert rows(digits, "train").isdisjoint(rows(digits, "validation"))
    assert rows(digits, "validation").isdisjoint(rows(digits, "test"))


def test_the_seed_orders_the_batches_and_keeps_the_splits():
    pytest.importorskip("sklearn")
    first, again, other = (load_data("digits", seed=seed, image_size=8) for seed in (1, 1, 2))
    assert torch.equal(everything(first.train)[0], everything(again.train)[0])
    assert not torch.equal(everything(first.train)[0], everything(other.train)[0])
    assert torch.equal(everything(first.test)[0], everything(other.test)[0])


def test_digits_channels_are_copies():
    pytest.importorskip("sklearn")
    images, _ = next(iter(load_data("digits", image_size=16, in_chans=3).validation))
    assert images.shape[1:] == (3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])


def test_last_small_training_batch_is_dropped():
    pytest.importorskip("sklearn")
    data = load_data("digits", batch_size=100)
    assert {len(labels) for _, labels in data.train} == {100}
    assert sum(len(labels) for _, labels in data.test) == 360


@pytest.fixture
def folder(tmp_path) -> Path:
    pytest.importorskip("timm")
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", count=5)
    return tmp_path


def test_folder_holds_out_the_last_tenth_of_each_class(folder):
    data = load_data(str(folder), image_size=32, config={"mean": (0, 0, 0), "std": (1, 1, 1)})
    assert (data.num_classes, data.input_size, data.num_data) == (3, (3, 32, 32), 54)
    images, labels = everything(data.validation)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (images[:, 1, 0, 0] * 255).round().tolist() == [18, 19] * 3
    images, labels = everything(data.train)
    assert images.shape == (54, 3, 32, 32)
    assert (images[:, 1] * 255).round().max() == 17
    assert torch.equal((images[:, 0, 0, 0] * 255).round(), 40.0 * labels)
    assert torch.bincount(everything(data.test)[1]).tolist() == [5, 5, 5]


def test_folder_with_validation_and_test_uses_both(folder):
    write_images(folder / "test", count=3)
    data = load_data(str(folder), image_size=32)
    assert [len(loader.dataset) for loader in (data.train, data.validation, data.test)] == [60, 15, 9]


def test_config_of_a_model_sets_size_and_normalisation(folder):
    config = {"input_size": (3, 48, 48), "mean": (0.2, 0.4, 0.6), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
    data = load_data(str(folder), config=config)
    images, labels = everything(data.test)
    assert data.input_size == (3, 48, 48)
    torch.testing.assert_close(images[:, 0, 5, 5], (40.0 * labels / 255 - 0.2) / 0.5)
    torch.testing.assert_close(images[:, 2, 5, 5], torch.full((15,), -0.6 / 0.5))


def test_grey_images_take_the_mean_of_the_normalisation(folder):
    data = load_data(str(folder), image_size=32, in_chans=1, config={"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.3)})
    images, labels = everything(data.test)
    assert images.shape == (15, 1, 32, 32)
    black = images[labels == 0][0, 0, 0, 0]
    torch.testing.assert_close(black, torch.tensor(-0.4 / 0.2))


def test_augmentation_changes_only_training_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("timm")
    for folder in (tmp_path / split / name for split in ("train", "test") for name in ("one", "other")):
        folder.mkdir(parents=True)
        for number in range(10):
            image.linear_gradient("L").save(folder / f"{number}.png")
    data = load_data(str(tmp_path), image_size=32, augment=True)
    assert len(rows(data, "train")) > 1
    assert rows(data, "validation") == rows(data, "test")
    assert len(rows(data, "test")) == 1


def test_augmented_images_have_the_size_that_a_given_transform_makes(folder):
    image = pytest.importorskip("PIL.Image")

    def transform(picture: image.Image) -> torch.Tensor:
        return torch.zeros(3, *picture.resize((24, 20)).size[::-1])

    data = load_data(str(folder), transform=transform, augment=True)
    assert data.input_size == (3, 20, 24)
    assert {image.shape[1:] for loader in (data.train, data.validation) for image, _ in loader} == {(3, 20, 24)}


def test_torchvision_data_set(tmp_path):
    pytest.importorskip("timm")

    def header(magic: int, *shape: int) -> bytes:
        return b"".join(n.to_bytes(4, "big") for n in (magic, *shape))

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 40), ("t10k", 20)):
        pixels = bytes(n for n in range(count) for _ in range(28 * 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header(2051, count, 28, 28) + pixels)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header(2049, count) + bytes(n % 2 for n in range(count)))
    data = load_data("torch/mnist", root=tmp_path)
    assert (data.num_classes, data.input_size) == (2, (1, 28, 28))
    assert [len(loader.dataset) for loader in (data.train, data.validation, data.test)] == [36, 4, 20]
    assert everything(data.validation)[1].tolist() == [0, 1, 0, 1]


def test_hugging_face_data_set(folder, monkeypatch, tmp_path_factory):
    pytest.importorskip("datasets")
    data = load_data(
        f"hfds/{folder}", root=tmp_path_factory.mktemp("cache"), image_size=32, in_chans=1, test_split="validation"
    )
    assert (data.num_classes, data.input_size) == (3, (1, 32, 32))
    assert [len(loader.dataset) for loader in (data.train, data.validation, data.test)] == [54, 6, 15]
    assert everything(data.test)[0].shape == (15, 1, 32, 32)


def test_unknown_names_say_what_is_known(tmp_path):
    with pytest.raises(ValueError, match="expected the name of a data set of Hugging Face after hfds/"):
        load_data("hfds/")
    with pytest.raises(ValueError, match=r"load_data got 'digit', which is no folder; expected 'digits', 'torch/NAME'"):
        load_data("digit")
    with pytest.raises(ValueError, match=r"load_data got 'torch/mnits'; of torchvision it knows cifar10, .*mnist"):
        load_data("torch/mnits", root=tmp_path)
    with pytest.raises(ValueError, match="in_chans=4"):
        load_data("digits", in_chans=4)
    with pytest.raises(ValueError, match="augment=True for digits"):
        load_data("digits", augment=True)


def test_folder_without_splits_is_refused(tmp_path):
    """timm falls back to the folder itself, so that a model would be tested on its training images."""
    pytest.importorskip("timm")
    write_images(tmp_path)
    with pytest.raises(ValueError, match=r"with cat, dog, owl; expected a folder train with one folder of images"):
        load_data(str(tmp_path))


def test_images_of_one_class_are_refused(tmp_path):
    """Without folders of classes timm takes all images for one class."""
    pytest.importorskip("timm")
    for split in ("train", "test"):
        write_images(tmp_path, (split,), 3)
    with pytest.raises(ValueError, match="all of one class, ''; expected two classes or more, in a folder one folder"):
        load_data(str(tmp_path))


def test_images_of_an_unknown_kind_are_said(tmp_path):
    pytest.importorskip("timm")
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "0.webp").touch()
    with pytest.raises(ValueError, match="cannot be read: Found 0 images .* Supported image extensions are .png"):
        load_data(str(tmp_path))
    with pytest.raises(ValueError, match="load_data got 'torch/mnist', which cannot be read: Dataset not found"):
        load_data("torch/mnist", root=tmp_path)


def test_splits_with_different_classes_are_refused(tmp_path):
    """Labels count folders: a class that one split lacks would shift all labels after it."""
    pytest.importorskip("timm")
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", classes=("cat", "owl"))
    with pytest.raises(ValueError, match="different classes: dog is in one"):
        load_data(str(tmp_path))


def test_one_image_of_a_class_cannot_be_held_out(tmp_path):
    pytest.importorskip("timm")
    write_images(tmp_path / "train", count=1)
    write_images(tmp_path / "test")
    with pytest.raises(ValueError, match="one training image of class 0"):
        load_data(str(tmp_path))


def test_labels_of_a_split_that_are_kept_secret_are_told_before_any_training(folder, monkeypatch):
    read = reading._labels
    monkeypatch.setattr(reading, "_labels", lambda data: read(data) if len(data) != 15 else torch.full((15,), -1))
    with pytest.raises(
        ValueError, match=r"whose test images have the label -1 \(15 of 15\); expected numbers of the 3"
    ):
        load_data(str(folder))


@pytest.mark.parametrize(("package", "extra"), [("sklearn", "digits"), ("timm", "timm")])
def test_missing_libraries_give_the_pip_line(package, extra, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return original(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "bayesprune\[{extra}\]"'):
        load_data("digits" if package == "sklearn" else str(tmp_path))
