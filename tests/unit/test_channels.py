"""Images that are no photographs: how their files are read, and what networks make of their channels."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import timm
import torch
from safetensors.torch import save_file

from segdistill import images
from segdistill.__main__ import main
from segdistill.config import parse, to_dict
from segdistill.data import decoding
from segdistill.data.decoding import BadFile, decode_pixels, encode_pixels, resize_pixels
from segdistill.data.settings import AugmentationConfig
from segdistill.data.statistics import data_format, pixel_facts
from segdistill.data.transforms import Augmentation, cut
from segdistill.errors import UserError
from segdistill.images import RGB, ImageFormat
from segdistill.models.config import ModelConfig, for_images
from segdistill.models.export import save_model
from segdistill.models.segmenter import Segmenter, build_segmenter
from segdistill.models.teachers import build_network
from segdistill.report.pictures import visible

FIVE = np.random.default_rng(0).integers(0, 65536, (7, 9, 5)).astype(np.uint16)  # [H, W, C]


def tiff(pixels: np.ndarray, **settings: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **{"photometric": "minisblack", **settings})
    return stream.getvalue()


def array(values: Any, **settings: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **settings)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        tiff(FIVE, planarconfig="contig"),
        tiff(FIVE, planarconfig="contig", byteorder=">", bigtiff=True),
        tiff(FIVE, planarconfig="contig", compression="deflate", predictor=True),
        tiff(FIVE.transpose(2, 0, 1), planarconfig="separate", tile=(16, 16)),
        tiff(FIVE.transpose(2, 0, 1)),  # a page a channel
        array(FIVE),
        array(np.asfortranarray(FIVE)),
        array(FIVE.astype(">u2")),
        encode_pixels(FIVE),
    ],
    ids=["together", "big endian", "deflate", "apart, in tiles", "pages", "npy", "npy by column", "npy big", "ours"],
)
def test_every_way_to_store_five_channels_gives_the_same_pixels(content: bytes) -> None:
    pixels = decode_pixels(content)
    assert pixels.dtype == np.uint16 and pixels.dtype.isnative
    np.testing.assert_array_equal(pixels, FIVE)


def test_one_channel_and_overviews_are_read_for_what_they_are() -> None:
    grey = FIVE[..., 0].astype(np.uint8)
    for content in (tiff(grey), array(grey)):
        np.testing.assert_array_equal(decode_pixels(content), grey[..., None])
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:  # as a cloud-optimised GeoTIFF has them
        writer.write(FIVE, photometric="minisblack", planarconfig="contig")
        writer.write(FIVE[::2, ::2], photometric="minisblack", planarconfig="contig", subfiletype=1)
    np.testing.assert_array_equal(decode_pixels(stream.getvalue()), FIVE)


def compressed(name: bytes) -> bytes:
    """A TIFF that says of its pixels what tifffile alone cannot undo."""
    content = bytearray(tiff(FIVE, planarconfig="contig"))
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as file:
        place = file.pages[0].tags["Compression"].valueoffset
    content[place : place + 2] = name
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (array(FIVE.astype(np.float32)), "values of type float32; uint8 or uint16 is due: scale floats"),
        (tiff(FIVE.astype(np.float32), planarconfig="contig"), "values of type float32; uint8 or uint16 is due"),
        (array(np.array([{}], dtype=object), allow_pickle=True), "an array of shape [1]; [height, width]"),
        (array(np.full((2, 2), None), allow_pickle=True), "values of type object; uint8 or uint16 is due"),
        (array(FIVE)[:-3], "damaged or truncated"),
        (tiff(FIVE, planarconfig="contig")[:-9], "damaged or truncated"),
        (b"II*\0junk", "damaged or truncated"),
        (array(np.zeros((2, 2, 300), np.uint8)), "2 x 2 pixels of 300 channels"),
        (compressed(b"\x05\0"), "its compression LZW needs the library imagecodecs, which is not installed"),
        (tiff(FIVE[..., 0].astype(np.uint8), photometric="miniswhite"), "its pixels are MINISWHITE"),
        (tiff(FIVE, planarconfig="contig", extratags=[(274, 3, 1, 6, True)]), "its orientation tag is 6"),
    ],
)  # fmt: skip
def test_what_is_no_image_of_8_or_16_bits_is_refused_in_one_sentence(content: bytes, sentence: str) -> None:
    with pytest.raises(BadFile) as caught:
        decode_pixels(content)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_beyond_the_limit_is_refused_before_its_pixels_are_read() -> None:
    with pytest.raises(BadFile, match="million pixels; at most"):
        decode_pixels(tiff(FIVE, planarconfig="contig"), most_pixels=60)


def test_statistics_are_of_the_train_split_and_two_formats_are_refused() -> None:
    images = [FIVE[:3], FIVE[3:]]
    rows = [{"split": "train", "image_file": f"{place}.tif", "facts": pixel_facts(pixels)}
            for place, pixels in enumerate(images)]  # fmt: skip
    test = {"split": "test", "image_file": "test.tif", "facts": pixel_facts(FIVE[:1] // 2)}
    known = data_format([*rows, test])
    assert known == data_format([test, *reversed(rows)])
    np.testing.assert_allclose(known.mean, (FIVE / 65535).mean((0, 1)))
    np.testing.assert_allclose(known.std, (FIVE / 65535).std((0, 1)))
    photograph = {"split": "train", "image_file": "a.png", "facts": pixel_facts(np.zeros((2, 2, 3), np.uint8))}
    assert data_format([photograph]) == RGB, "whose normalisation is the encoder's"
    with pytest.raises(UserError, match=r"a\.png: 3 channels of 8 bits, but 0\.tif has 5 channels of 16 bits"):
        data_format([*rows, photograph])


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
@pytest.mark.parametrize("channels", [1, 5])
def test_the_first_convolution_is_adapted_as_timm_does(encoder: str, channels: int, tmp_path: Path) -> None:
    name = encoder.removeprefix("tu-")
    torch.manual_seed(0)
    source = timm.create_model(name)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    expected = timm.create_model(name, in_chans=channels, pretrained=True, pretrained_cfg_overlay=overlay)
    config = ModelConfig(
        architecture="FPN", encoder=encoder, output_stride=32, encoder_weights=str(tmp_path / "weights.safetensors"),
    )  # fmt: skip
    images = ImageFormat(channels=channels, bits=16, mean=(0.4,) * channels, std=(0.2,) * channels)
    network = build_segmenter(for_images(config, images), 3).eval()
    pixels = torch.rand(2, channels, 64, 64)
    with torch.no_grad():
        deepest = network(pixels).features[-1]
        stages = expected.eval().forward_intermediates((pixels - 0.4) / 0.2, intermediates_only=True, norm=False)
    torch.testing.assert_close(deepest, stages[-1])


@pytest.mark.parametrize(
    ("architecture", "encoder", "stride"),
    [("Segformer", "mit_b0", 32), ("DPT", "vit_tiny_patch16_224", 16), ("FPN", "mobilenetv3_small_050", 32)],
)
def test_a_network_of_five_channels_can_be_built_from_its_file_again(
    architecture: Any, encoder: str, stride: Any
) -> None:
    images = ImageFormat(channels=5, bits=16, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.1,) * 4 + (0.0,))
    config = ModelConfig(architecture=architecture, encoder=encoder, output_stride=stride)
    network = Segmenter(for_images(config, images), 3).eval()
    again = build_network(to_dict(network.config), 3, "model").eval()
    again.load_state_dict(network.state_dict())
    pixels = torch.rand(1, 5, 64, 64)
    with torch.no_grad():
        logits = network.logits(pixels)
        assert torch.equal(logits, again.logits(pixels)) and logits.isfinite().all()
    assert again.images == images


def test_of_photographs_nothing_is_said_in_a_network_and_some_channels_can_be_chosen() -> None:
    config = ModelConfig(architecture="FPN", encoder="mobilenetv3_small_050", output_stride=32)
    assert for_images(config, RGB) is config and "images" not in to_dict(Segmenter(config, 2).config)
    some = parse(ModelConfig, to_dict(config) | {"channels": [1]}, "model")
    network = Segmenter(some, 2)
    assert network.mean.shape == (1, 1, 1, 1) and network.mean.item() == Segmenter(config, 2).mean[0, 1].item()
    with pytest.raises(UserError, match="channels"):
        parse(ModelConfig, to_dict(config) | {"channels": []}, "model")


def test_crops_of_16_bits_are_scaled_flipped_and_jittered_without_losing_bits() -> None:
    config = AugmentationConfig(crop_size=(8, 8), scale=(1.0, 1.0), flip=1.0, color_jitter=0.0)
    label = np.zeros((7, 9), np.uint8)
    augment = Augmentation(config)
    crop = augment.draw(label.shape, seed=3)
    window = cut(FIVE, label, crop.window, pinned=False)
    images, labels = augment([(window, crop)], torch.device("cpu"))
    shown = torch.from_numpy(FIVE[crop.window].astype(np.float32)).permute(2, 0, 1).flip(-1) / 65535
    torch.testing.assert_close(images[0][:, *crop.place], shown)
    assert labels.dtype == torch.uint8 and (labels[0][crop.place] == 0).all()

    larger = Augmentation(AugmentationConfig(crop_size=(8, 8), scale=(2.0, 2.0), flip=0.0, color_jitter=0.5))
    crop = larger.draw(label.shape, seed=3)
    images, _ = larger([(cut(FIVE, label, crop.window, pinned=False), crop)], torch.device("cpu"))
    assert images.shape == (1, 5, 8, 8) and images.min() >= 0 and images.max() <= 1


def test_people_see_the_first_three_channels_stretched_and_photographs_as_they_are() -> None:
    photograph = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert visible(photograph) is photograph
    shown = visible(FIVE)
    assert (shown.shape, shown.dtype, shown.min(), shown.max()) == ((7, 9, 3), np.uint8, 0, 255)
    grey = visible(FIVE[..., :2])
    assert (grey[..., 0] == grey[..., 2]).all() and (grey[..., 0] == shown[..., 0]).all()


def test_shrinking_averages_each_channel() -> None:
    flat = np.broadcast_to(np.array([10, 20000, 65535, 7], np.uint16), (8, 8, 4))
    np.testing.assert_array_equal(resize_pixels(flat, (4, 2)), flat[:2, :4])


def test_a_network_of_five_channels_predicts_from_its_folder_and_from_a_file_and_takes_no_photograph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ImageFormat(channels=5, bits=16, mean=(0.5,) * 5, std=(0.3,) * 5)
    config = ModelConfig(architecture="FPN", encoder="mobilenetv3_small_050", output_stride=32)
    classes = [{"name": name, "color": [90, 10, 10]} for name in ("a", "b")]
    save_model(tmp_path / "model", "cnn", Segmenter(for_images(config, images), 2).eval(), {"classes": classes})
    (tmp_path / "photos").mkdir()
    field = np.tile(FIVE, (6, 8, 1))
    (tmp_path / "photos/field.tif").write_bytes(tiff(field, planarconfig="contig"))
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "cnn.pt2"), "--size", "64", "96"]) == 0
    for name in ("model", "cnn.pt2"):
        where = [str(tmp_path / name), str(tmp_path / "photos"), "--out", str(tmp_path / f"of-{name}")]
        assert main(["predict", *where, "--overlay"]) == 0
    masks = [(tmp_path / f"of-{name}/masks/field.png").read_bytes() for name in ("model", "cnn.pt2")]
    assert masks[0] == masks[1] and (tmp_path / "of-model/overlay/field.png").is_file()
    said = json.loads((tmp_path / "of-cnn.pt2/classes.json").read_text())["input"]
    assert said["shape"] == ["batch", 5, "height", "width"] and said["bits"] == 16
    np.save(tmp_path / "photos/other.npy", FIVE.astype(np.uint8))
    assert main(["predict", *where[:2], "--out", str(tmp_path / "none")]) == 2
    assert (
        "other: 5 channels of 8 bits, but the network is made for images with 5 channels of 16"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "none").exists()


def test_what_is_read_and_what_networks_take_have_the_same_bound() -> None:
    assert images.MOST_CHANNELS == decoding.MOST_CHANNELS  # decoding.py goes with a model, and imports nothing of ours
