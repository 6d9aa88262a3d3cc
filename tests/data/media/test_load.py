"""Every way to name an image, every pixel mode, every fault."""

import base64
import io
import json
import random
import resource
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ivl.data.media.load import image_size, load_image, load_video, video_frame_count, video_info
from ivl.data.media.video import _DECODER
from ivl.options import MediaPolicy, Sampling
from ivl.types import UserError
from tests.data.bounds import peak_bytes
from tests.data.videos import write_long_video, write_video

RNG = np.random.default_rng(0)


def picture(width=40, height=30, mode="RGB") -> Image.Image:
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 256], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def level(frame: Image.Image) -> float:
    return float(np.asarray(frame).mean())


def test_recorded_pictures_have_the_recorded_pixels(golden):
    import hashlib

    entries = json.loads((golden / "pixels.json").read_text())
    for entry in entries:
        path = golden / entry["image"]
        image = load_image(path, exif=False)
        assert image.mode == "RGB" and list(image.size) == entry["size"]
        found = hashlib.sha256(image.tobytes()).hexdigest()
        assert path.suffix == ".jpg" or found == entry["decoded_rgb_sha256"], path


def test_all_ways_to_name_one_picture(tmp_path):
    data = encoded(picture(), "PNG")
    path = tmp_path / "a, b.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    wrapped = "data:image/png;base64,\n" + base64.encodebytes(data).decode()
    percent = "data:image/png," + "".join(f"%{b:02x}" for b in data)
    for source in (path, str(path), data, bytearray(data), uri, wrapped, percent, picture()):
        image = load_image(source)
        assert image.mode == "RGB" and (np.asarray(image) == np.asarray(picture())).all()
        assert image_size(source) == (40, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation(orientation, kind):
    """The size from the header is that of the upright picture; turned once, it is not turned again."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encoded(picture(), kind, exif=exif, **options)
    upright = load_image(data)
    assert upright.size == image_size(data) == ((30, 40) if orientation >= 5 else (40, 30))
    assert load_image(upright).tobytes() == upright.tobytes()
    # The stored corner (0, 0) is black; where it goes is the definition of the orientation
    corners = {1: (0, 0), 2: (-1, 0), 3: (-1, -1), 4: (0, -1), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}
    x, y = corners[orientation]
    assert np.asarray(upright)[y, x].max() < 20
    if kind != "TIFF":
        stored = load_image(data, exif=False)
        assert stored.size == image_size(data, exif=False) == (40, 30)
        assert load_image(stored).size == (40, 30)


def test_pixel_modes():
    opaque = np.asarray(picture())
    half = picture()
    half.putalpha(128)
    assert (np.asarray(load_image(encoded(half, "PNG"))) == opaque).all(), "alpha is dropped, not blended"
    grey = np.asarray(picture(mode="L"))
    for mode, kind in (("L", "PNG"), ("LA", "PNG"), ("L", "TIFF")):
        assert (np.asarray(load_image(encoded(picture(mode=mode), kind))) == grey[..., None]).all()
    deep = Image.fromarray((grey.astype(np.uint16) << 8) + 7)
    for kind in ("PNG", "TIFF"):
        assert (np.asarray(load_image(encoded(deep, kind))) == grey[..., None]).all(), "16 bits are scaled"
    bits = np.asarray(load_image(encoded(picture(mode="1"), "PNG")))
    assert set(np.unique(bits)) == {0, 255}
    palette = picture().quantize(16)
    assert load_image(encoded(palette, "PNG")).tobytes() == palette.convert("RGB").tobytes()
    assert load_image(encoded(picture(mode="CMYK"), "JPEG")).mode == "RGB"
    with pytest.raises(UserError, match="mode F"):
        load_image(encoded(picture(mode="F"), "TIFF"))


def test_bytes_behind_the_end_of_a_jpeg(tmp_path):
    """Phones keep a clip, or a second picture, behind a JPEG's end marker; a preview has one of its own."""
    write_video(tmp_path / "clip.mp4", 3)
    jpeg = encoded(picture(), "JPEG", progressive=True)
    expected = load_image(jpeg).tobytes()
    other = encoded(picture(20, 20), "JPEG")
    tails = (
        (tmp_path / "clip.mp4").read_bytes(),
        other,
        other[: len(other) // 2],
        b"SEFT\xff\xda" + bytes(100),
        b"\xff" * 9,
    )
    for tail in tails:
        assert load_image(jpeg + tail).tobytes() == expected
    preview = b"\xff\xe2" + (2 + len(other)).to_bytes(2, "big") + other
    assert load_image(jpeg[:2] + preview + jpeg[2:]).tobytes() == expected
    with pytest.raises(UserError, match="end marker is missing"):
        load_image(jpeg[:2] + preview + jpeg[2 : len(jpeg) // 2])


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a colour from (H, W, 3) or, with alpha, (H, W, 4) values."""
    height, width = values.shape[:2]
    colour = {3: 2, 4: 6}[values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    out = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


@pytest.mark.parametrize(("bits", "shift"), [(8, 0), (12, 4), (16, 8)])
def test_fewer_than_16_bits_in_16(bits, shift):
    """A camera's 12 bits are no black picture."""
    grey = np.asarray(picture(mode="L")).astype(np.uint16) << shift
    grey[0, 0] = (1 << bits) - 1
    expected = (grey >> shift).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        assert (np.asarray(load_image(encoded(Image.fromarray(grey), kind))) == expected[..., None]).all()
    colours = np.stack([grey, grey // 2, grey // 3], -1)
    assert (np.asarray(load_image(deep_png(colours))) == (colours >> shift).astype(np.uint8)).all()
    ground = np.full((*grey.shape, 1), 65535, np.uint16)
    ground[:, :5] = 0
    seen = load_image(deep_png(np.concatenate([colours, ground], -1)), policy=MediaPolicy(transparency="white"))
    assert (np.asarray(seen)[:, 5:] == (colours >> shift).astype(np.uint8)[:, 5:]).all()
    assert (np.asarray(seen)[:, :5] == 255).all()


def test_print_on_a_transparent_ground():
    """Black on transparent black: dropped alpha leaves black on black, as the reference does; or it is put on white."""
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:30] = 255
    rgba = Image.fromarray(np.concatenate([np.zeros((30, 40, 3), np.uint8), mask[..., None]], -1), "RGBA")
    la = rgba.convert("LA")
    palette = Image.fromarray((mask == 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0] * 2)
    white = MediaPolicy(transparency="white")
    for data in (
        encoded(rgba, "PNG"),
        encoded(la, "PNG"),
        encoded(palette, "PNG", transparency=1),
        encoded(rgba, "WEBP", lossless=True, exact=True),
    ):
        assert not np.asarray(load_image(data)).any()
        assert (np.asarray(load_image(data, policy=white))[..., 0] == 255 - mask).all()
    assert load_image(encoded(picture(), "PNG"), policy=white).tobytes() == picture().tobytes()


def test_a_picture_above_the_limit_of_pillow():
    """A phone's 200 megapixels open where `max_pixels` allows them, and the process's own limit stays."""
    data = encoded(Image.new("1", (16_320, 12_240)), "PNG")
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=r"199756800 pixels.*data\.media\.max_pixels"):
        image_size(data)
    policy = MediaPolicy(max_pixels=200_000_000)
    assert image_size(data, policy=policy) == load_image(data, policy=policy).size == (16_320, 12_240)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_faults_are_named(tmp_path):
    jpeg = encoded(picture(200, 200), "JPEG")
    png = encoded(picture(200, 200), "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    html = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    table = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (html, "text that begins with '<!DOCTYPE"),
        "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "zeros.jpg": (jpeg[: len(jpeg) // 2] + bytes(5000), "end marker"),
        "no_end.jpg": (jpeg[:-2], "end marker"),
        "cut.png": (png[: len(png) // 2], "damaged"),
        "flipped.png": (bytes(flipped), "damaged"),
        "zeros.png": (bytes(100), "nothing but zeros"),
        "noise.png": (bytes([1, 200, 7, 9]) * 30, "01 c8 07 09"),
        "scans.jpg": (jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * 200 + jpeg[-2:], "JPEG of more than 100 scans"),
        "a.pdf": (b"%PDF-1.4 etc", "PDF"),
        "a.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "expected an image"),
    }
    for name, (data, words) in table.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError, match=words) as caught:
            load_image(path)
        assert str(caught.value).startswith(str(path)), name
    for source, words in [
        (tmp_path / "missing.jpg", "no such file"),
        (tmp_path, "found a folder"),
        ("/dev/zero", "device"),
        ("a\0b.jpg", "cannot be opened"),
        ("x" * 10_000, "cannot be opened"),
        ("file:///etc/passwd", "file:// is not opened"),
        ("ftp://example.org/a.jpg", "ftp:// is not opened"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,@@@", "base64 is damaged"),
        ("data:image/png;base64,", "empty"),
        (b"", "empty"),
        (None, "NoneType"),
        (3, "int"),
    ]:
        for function in (load_image, image_size, load_video):
            with pytest.raises(UserError, match=None if source == tmp_path else words):
                function(source)


def test_size_is_read_from_the_header_alone(tmp_path):
    path = tmp_path / "cut.jpg"
    data = encoded(picture(900, 700), "JPEG")
    path.write_bytes(data[:1000])
    assert image_size(path) == (900, 700)
    with pytest.raises(UserError):
        load_image(path)


def test_bombs_are_refused():
    large = encoded(Image.new("1", (60_000, 3_000)), "PNG")
    assert len(large) < 100_000
    for function in (load_image, image_size):
        with pytest.raises(UserError, match="pixels"):
            function(large)
    thin = encoded(Image.new("1", (70_000, 1)), "PNG")
    with pytest.raises(UserError, match="max_side"):
        load_image(thin)
    small = MediaPolicy(max_pixels=100)
    for source in (encoded(picture(), "PNG"), picture()):
        with pytest.raises(UserError, match="max_pixels"):
            load_image(source, policy=small)


def test_a_damaged_exif_block_counts_as_none():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert load_image(data).size == image_size(data) == (40, 30)


def test_video_file(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path)
    info = video_info(path)
    assert (info.frames, info.width, info.height) == (30, 64, 48) and abs(info.fps - 10) < 0.1
    frames = load_video(path, Sampling(5))
    assert [round(level(f) / 8) for f in frames] == [2, 8, 14, 19, 25]
    assert all(f.mode == "RGB" and f.size == (64, 48) for f in frames)
    part = load_video(path, Sampling(2), start=1.0, end=2.0)
    assert [round(level(f) / 8) for f in part] == [12, 17]
    assert len(load_video(path, Sampling(fps=2.0))) == video_frame_count(path, Sampling(fps=2.0)) == 6
    assert video_frame_count(path, Sampling(7)) == 7 == video_frame_count("http://not.fetched/x.mp4", Sampling(7))
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:600])
    assert video_frame_count(tmp_path / "cut.mp4", Sampling(7)) == 7, "nothing is decoded"
    (tmp_path / "empty").mkdir()
    for name, words in (("gone.mp4", "no such file"), ("empty", "no frames")):
        with pytest.raises(UserError, match=words):
            video_frame_count(tmp_path / name, Sampling(7))
    (tmp_path / "page.mp4").write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"expected a video .*, found text"):
        video_frame_count(tmp_path / "page.mp4", Sampling(7))
    assert [level(f) for f in load_video(path.read_bytes(), Sampling(5))] == [level(f) for f in frames]
    draws = [
        load_video(path, Sampling(4, sample="random"), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    levels = [[level(f) for f in d] for d in draws]
    assert levels[0] == levels[1] != levels[2]


def test_three_hours_are_not_decoded_whole(tmp_path):
    """Each frame is sought: all of them would be 10800 frames, about a minute of computing."""
    path = write_long_video(tmp_path / "long.mp4", (640, 480))
    assert video_info(path).frames == 3 * 3600
    _DECODER.close()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert [round(level(f) / 80) for f in load_video(path, Sampling(8))] == [0, 0, 0, 1, 1, 2, 2, 2]
    _DECODER.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 5
    assert len(load_video(path, Sampling(fps=0.01))) == video_frame_count(path, Sampling(fps=0.01)) == 108
    with pytest.raises(UserError, match=r"256 frames of 640 x 480 pixels .*max_video_pixels"):
        load_video(path, Sampling(fps=1), policy=MediaPolicy(max_video_pixels=10_000_000))


def test_animations_and_folders(tmp_path):
    stills = [Image.new("RGB", (20, 10), (i * 20,) * 3) for i in range(12)]
    for name, options in (("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})):
        stills[0].save(tmp_path / name, save_all=True, append_images=stills[1:], duration=200, **options)
        assert video_info(tmp_path / name) == video_info((tmp_path / name).read_bytes())
        assert video_info(tmp_path / name).frames == 12 and video_info(tmp_path / name).fps == 5.0
        assert [level(f) for f in load_video(tmp_path / name, Sampling(4))] == [20, 80, 140, 180]
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, still in enumerate(stills):
        still.save(folder / f"f{i}.png")
    (folder / "notes.txt").write_text("not a frame")
    for source in (folder, str(folder), stills, [folder / f"f{i}.png" for i in range(12)]):
        assert [level(f) for f in load_video(source, Sampling(4))] == [20, 80, 140, 180]
    cut = load_video(folder, Sampling(3), start=1, end=2)
    assert [level(f) for f in cut] == [60, 80, 100]


def test_video_faults_are_named(tmp_path):
    write_video(tmp_path / "good.mp4")
    good = (tmp_path / "good.mp4").read_bytes()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n"
    table = {
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"no video at all", "text that begins with"),
        "list.mp4": (playlist, "text that begins with '#EXTM3U"),
        "image.mp4": (encoded(picture(), "JPEG"), "JPEG image; list it under images"),
        "cut.mp4": (good[:300], "pyav cannot read"),
        "noise.mp4": (good[:40] + bytes(2000), "pyav cannot read"),
    }
    for name, (data, words) in table.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=words) as caught:
            load_video(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
    (tmp_path / "none").mkdir()
    for source, words in (
        (tmp_path / "none", "no frames"),
        ([], "no frames"),
        (picture(), "one image"),
        (tmp_path / "gone.mp4", "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            load_video(source)
    with pytest.raises(UserError, match=r"3\.00 seconds"):
        load_video(tmp_path / "good.mp4", start=5)
    with pytest.raises(UserError, match="max_video_pixels"):
        load_video(tmp_path / "good.mp4", policy=MediaPolicy(max_video_pixels=10_000))
    with pytest.raises(UserError, match=r"good.mp4: decoding did not end within 0 s; .*video_timeout"):
        load_video(tmp_path / "good.mp4", policy=MediaPolicy(video_timeout=0))


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One of the ways in which files break: bits flipped, cut, grown, blocks lost, zeroed or doubled."""
    broken = bytearray(data)
    at = draw.randrange(len(broken))
    size = draw.randrange(1, 1 + min(64, len(broken)))
    way = draw.randrange(6)
    if way == 0:
        for _ in range(draw.randrange(1, 20)):
            broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
    elif way == 1:
        del broken[at:]
    elif way == 2:
        del broken[at : at + size]
    elif way == 3:
        broken[at : at + size] = bytes(len(broken[at : at + size]))
    elif way == 4:
        broken[at:at] = draw.randbytes(size)
    else:
        for _ in range(draw.randrange(1, 10)):  # headers are where the numbers are
            broken[draw.randrange(min(64, len(broken)))] = draw.randrange(256)
    return bytes(broken)


@pytest.mark.filterwarnings("ignore")  # Pillow's own remarks on broken files
def test_2000_mutated_images():
    """Each gives an image or a UserError, and the header's size is the picture's."""
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [
        encoded(picture(), "JPEG", exif=exif),
        encoded(picture(), "JPEG", progressive=True),
        encoded(picture(mode="CMYK"), "JPEG"),
        encoded(picture(), "PNG", exif=exif),
        encoded(picture(mode="P"), "PNG"),
        encoded(picture(), "GIF", save_all=True, append_images=[picture().rotate(90)] * 3),
        encoded(picture(), "WEBP"),
        encoded(picture(), "WEBP", lossless=True, exif=exif),
        encoded(picture(), "BMP"),
        encoded(picture(), "TIFF"),
        encoded(picture(), "TIFF", compression="tiff_lzw"),
        encoded(picture(), "TIFF", compression="jpeg"),
        encoded(picture(), "PPM"),
        encoded(picture(), "JPEG2000"),
        encoded(picture(), "AVIF"),
    ]
    draw = random.Random(0)
    policy = MediaPolicy(max_pixels=4_000_000)
    good, before = 0, peak_bytes()
    for i in range(2000):
        begun = time.process_time()
        data = mutate(seeds[i % len(seeds)], draw)
        try:
            image = load_image(data, policy=policy)
        except UserError as error:
            assert len(str(error)) > 20
            continue
        good += 1
        assert time.process_time() - begun < 5, i
        assert image.mode == "RGB"
        assert image_size(data, policy=policy) == image.size, i
    assert 200 < good < 1800
    assert peak_bytes() - before < 300e6, "an image has 12 MB at most"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_videos(tmp_path, count):
    """Damaged videos may crash a decoder; here each gives frames or a UserError, and the next one is read."""
    write_video(tmp_path / "a.mp4", 12)
    write_video(tmp_path / "a.avi", 12)
    stills = [Image.new("RGB", (20, 10), (i * 20,) * 3) for i in range(6)]
    gif, webp = (encoded(stills[0], kind, save_all=True, append_images=stills[1:]) for kind in ("GIF", "WEBP"))
    seeds = [(tmp_path / "a.mp4").read_bytes(), (tmp_path / "a.avi").read_bytes(), gif, webp]
    policy = MediaPolicy(max_pixels=4_000_000, video_timeout=5)
    good = 0
    for i in range(count):
        data = mutate(seeds[i % len(seeds)], random.Random(i))
        try:
            frames = load_video(data, Sampling(4), policy=policy)
        except UserError as error:
            assert len(str(error)) > 20
            continue
        good += 1
        assert len(frames) == 4 and all(f.mode == "RGB" for f in frames)
    assert count / 10 < good < count
