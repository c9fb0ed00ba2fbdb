"""Crop to Face in the host: boxes, masks, and a real detector on real photographs where OpenCV is installed."""

from __future__ import annotations

from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

MEDIA = "comfyui_workflow_templates_media_image"  # photographs that the host's packages carry


@pytest.fixture(scope="module")
def portrait() -> torch.Tensor:
    """IMAGE of a photograph that shows one face from the front."""
    folder = Path(find_spec(MEDIA).origin).parent / "templates"
    with Image.open(folder / "flux1_krea_dev-1.webp") as file:
        return torch.from_numpy(np.asarray(file.convert("RGB")).astype(np.float32) / 255)[None]


@pytest.fixture
def error(host):
    return host.module("hdb_core.errors").FaceError


def box(x, y, width, height):
    return {"x": x, "y": y, "width": width, "height": height}


def noise(height, width, channels=3):
    return torch.rand(1, height, width, channels, generator=torch.Generator().manual_seed(0))


def painted(height, width, top, left, side):
    mask = torch.zeros(1, height, width)
    mask[:, top : top + side, left : left + side] = 1
    return mask


def test_the_square_of_a_box(run):
    image = noise(400, 500)
    (face,), (mask,), (place,) = run("CropToFace", image=image, bboxes=box(200, 150, 75, 100))
    assert place == box(170, 126, 134, 134) and face.shape == (1, 134, 134, 3) and mask.shape == (1, 134, 134)
    assert torch.equal(face, image[:, 126:260, 170:304])
    assert mask[0, 74, 67] == 1 and not mask[0, [0, 0, -1, -1], [0, -1, 0, -1]].any()
    (wider,), _, (around,) = run("CropToFace", image=image, bboxes=box(200, 150, 75, 100), margin=0.5)
    assert wider.shape[1] == 268 and around["x"] == 104


def test_a_mask_marks_the_face_and_is_cut_along(run):
    image, mask = noise(300, 300), painted(300, 300, 100, 120, 60)
    (face,), (cut,), (place,) = run("CropToFace", image=image, mask=mask)
    assert cut.sum() == mask.sum() and place == box(110, 86, 80, 80)
    assert torch.equal(face, image[:, 86:166, 110:190])


def test_photos_of_any_size_in_a_list_each_with_its_own_boxes(run):
    images = [noise(200, 200), noise(400, 300).expand(2, -1, -1, -1)]
    boxes = [[box(50, 50, 60, 80)], [box(9, 9, 40, 40), box(100, 100, 90, 120)], [box(30, 30, 50, 60)]]
    faces, masks, places = run("CropToFace", image=images, bboxes=[boxes])
    assert [face.shape[1] for face in faces] == [mask.shape[1] for mask in masks] == [107, 161, 80]
    assert len(places) == 3


@pytest.mark.parametrize(
    ("order", "index", "left"), [("largest first", 0, 200), ("left to right", 0, 20), ("most central first", 1, 150)]
)
def test_several_faces_are_chosen_from(run, order, index, left):
    boxes = [box(20, 20, 60, 60), box(200, 180, 90, 90), box(150, 100, 50, 50)]
    _, _, (place,) = run("CropToFace", image=noise(400, 400), bboxes=[boxes], order=order, index=index)
    side = round(1.34 * next(b["width"] for b in boxes if b["x"] == left))
    assert place["width"] == side


def test_a_face_at_the_edge_is_cut_off_there_and_the_edge_repeated(run):
    image = noise(200, 200)
    (face,), _, (place,) = run("CropToFace", image=image, bboxes=box(-20, 40, 100, 100))
    assert place["x"] < 0 and face.shape == (1, 134, 134, 3)
    assert torch.equal(face[:, :, 0], face[:, :, -place["x"]])


def test_grey_and_transparent_photos(run):
    image, place = noise(200, 200), box(50, 50, 80, 80)
    grey = run("CropToFace", image=image[..., :1], bboxes=place)[0][0]
    assert grey.shape[-1] == 3 and torch.equal(grey[..., 0], grey[..., 2])
    hidden = torch.cat([image, torch.zeros(1, 200, 200, 1)], -1)
    assert torch.equal(run("CropToFace", image=hidden, bboxes=place)[0][0], torch.ones(1, 107, 107, 3))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"bboxes": [[]]}, "No face was found"),
        ({"bboxes": box(10, 10, 20, 20)}, "The face has 20 × 20 pixels"),
        ({"bboxes": box(10, 10, 50, 50), "index": 1}, "counted from 0, the last is 0, and index is 1"),
        ({"bboxes": [[[box(9, 9, 50, 50)], [], []]]}, "1 photos and boxes for 3"),
        ({"bboxes": "face"}, "BOUNDING_BOX holds no boxes"),
        ({"bboxes": torch.tensor([[10.0, 10.0, 50.0, 50.0]])}, "BOUNDING_BOX holds no boxes"),
        ({"bboxes": np.array([[10.0, 10.0, 50.0, 50.0]])}, "BOUNDING_BOX holds no boxes"),
        ({"bboxes": box(60, 10, -50, 100)}, "BOUNDING_BOX holds no boxes"),
        ({"bboxes": [[box(10, 10, 50, 50), box(60, 60, 9, -9)]]}, "BOUNDING_BOX holds no boxes"),
        ({"mask": torch.full((1, 200, 200), 0.4)}, "The mask is empty"),
        ({"mask": torch.ones(1, 90, 90)}, "The photo has 200 × 200 pixels, the mask 90 × 90"),
        ({"mask": 1 - painted(200, 200, 40, 40, 120)}, "leaves out its middle"),
        ({"image": torch.full((1, 200, 200, 3), torch.nan)}, "NaN"),
        ({"index": [0, 1], "bboxes": box(10, 10, 50, 50)}, "index got a list of 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_said(run, error, inputs, message):
    with pytest.raises(error, match=message):
        run("CropToFace", **{"image": noise(200, 200)} | inputs)


def test_without_a_detector_the_three_ways_are_named(run, host, error, monkeypatch):
    monkeypatch.setattr(host.module("hdb_core.detectors"), "has_opencv", lambda: False)
    host.module("nodes.host.faces")._has_cascade.cache_clear()
    with pytest.raises(error, match=r"MASK.*bboxes.*YuNet file \(https://.*yunet_final.pth\) into .*detection"):
        run("CropToFace", image=noise(200, 200))
    host.module("nodes.host.faces")._has_cascade.cache_clear()


def test_the_wrong_photo_of_several_is_named(run, error):
    boxes = [[[box(50, 50, 60, 80)], []]]
    with pytest.raises(error, match="Photo 2 of 2: No face"):
        run("CropToFace", image=noise(200, 200).expand(2, -1, -1, -1), bboxes=boxes)


def test_a_real_face_is_found_by_opencv(run, host, error, portrait):
    pytest.importorskip("cv2")
    host.module("nodes.host.faces")._has_cascade.cache_clear()
    (face,), _, (place,) = run("CropToFace", image=portrait)
    width = portrait.shape[2]
    assert 0.3 < place["width"] / width < 1 and face.shape[1] == place["width"]
    assert abs(place["x"] + place["width"] / 2 - width / 2) < width / 5
    for unpainted in (torch.zeros(1, 64, 64), torch.zeros(1, *portrait.shape[1:3])):  # the first is Load Image's
        assert run("CropToFace", image=portrait, mask=unpainted)[2] == [place]
    with pytest.raises(error, match=r"No face was found \(OpenCV's cascade\). Mark it yourself: .*Mask Editor"):
        run("CropToFace", image=noise(300, 300))


def test_yunet_weights_are_read_from_the_folder_without_a_download(run, host, base_directory, error):
    from kornia.models.yunet import YuNet

    folder = base_directory / "models" / "detection"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "face_yunet_random.safetensors"
    save_file(YuNet("test", pretrained=False).state_dict(), path)
    name, find = host.module("nodes.host.faces").detector()
    assert name == "YuNet, face_yunet_random.safetensors" and find(noise(100, 150)[0].movedim(-1, 0)) == []
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(error, match=r"'face_yunet_random\.safetensors' is no YuNet file"):
        run("CropToFace", image=noise(200, 200))
    path.unlink()


def test_folders_of_extra_model_paths_do_not_replace_ours(host, base_directory, monkeypatch):
    faces, known = host.module("nodes.host.faces"), host.folder_paths.folder_names_and_paths
    monkeypatch.delitem(known, faces.FOLDER, raising=False)
    host.folder_paths.add_model_folder_path(faces.FOLDER, "/elsewhere")
    faces.register_detectors()
    faces.register_detectors()
    ours = str(base_directory / "models" / faces.FOLDER)
    assert host.folder_paths.get_folder_paths(faces.FOLDER) == ["/elsewhere", ours]
    monkeypatch.delitem(known, faces.FOLDER)
    faces.register_detectors()
    assert host.folder_paths.get_folder_paths(faces.FOLDER) == [ours]


def message(**fields):
    """Fields of ONNX's messages, by number: numbers, bytes, or several of either."""
    found = b""
    for name, values in fields.items():
        number = int(name[1:])
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int):
                found += bytes([number << 3, *([value] if value < 128 else [value % 128 + 128, value // 128])])
            else:
                size = [len(value)] if len(value) < 128 else [len(value) % 128 + 128, len(value) // 128]
                found += bytes([number << 3 | 2, *size]) + value
    return found


def onnx_of_another_model():
    """A network of one ReLU."""
    shape = message(_1=[message(_1=side) for side in (1, 3, 640, 640)])
    x, y = (message(_1=name, _2=message(_1=message(_1=1, _2=shape))) for name in (b"x", b"y"))
    graph = message(_1=message(_1=b"x", _2=b"y", _3=b"n", _4=b"Relu"), _2=b"g", _11=x, _12=y)
    return message(_1=7, _7=graph, _8=message(_1=b"", _2=13))


DAMAGED = {
    "page.pth": lambda path: path.write_text("<html>"),
    "empty.pth": lambda path: path.touch(),
    "page.safetensors": lambda path: path.write_text("<html>" * 9),
    "page.onnx": lambda path: path.write_text("<html>"),
    "another.onnx": lambda path: path.write_bytes(onnx_of_another_model()),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_a_detector(run, host, base_directory, error, name):
    """Crop to Face says so; nodes that only have a look at the photo go on."""
    if name.endswith(".onnx"):
        pytest.importorskip("cv2")
    (folder := base_directory / "models" / "detection").mkdir(parents=True, exist_ok=True)
    DAMAGED[name](path := folder / f"yunet_{name}")
    try:
        with pytest.raises(error, match=r"yunet_.*Take.*YuNet.*or remove it") as caught:
            run("CropToFace", image=noise(200, 200))
        seen = host.module("nodes.host.faces").seen_in([noise(200, 200)[0].movedim(-1, 0)])
        assert seen == [str(caught.value)] and "weights_only" not in seen[0]
    finally:
        path.unlink()


def test_a_pickle_of_somebody_else_is_not_read(host, error, tmp_path, monkeypatch):
    """One can ask for all time and memory, also of those that torch calls safe. kornia's own is known by its hash."""
    from kornia.models.yunet import YuNet

    detectors = host.module("hdb_core.detectors")
    torch.save(YuNet("test", pretrained=False).state_dict(), path := tmp_path / "yunet.pth")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
        with pytest.raises(error, match=r"no YuNet file\. Take kornia's yunet_final\.pth"):
            detectors.yunet(path)
    monkeypatch.setattr(detectors, "PUBLISHED", sha256(path.read_bytes()).hexdigest())
    assert detectors.yunet(path)(noise(100, 150)[0].movedim(-1, 0)) == []


def test_what_is_no_file_is_no_detector(host, base_directory):
    (folder := base_directory / "models" / "detection").mkdir(parents=True, exist_ok=True)
    (link := folder / "yunet_gone.pth").symlink_to(folder / "nowhere")
    (below := folder / "yunet_folder.pth").mkdir()
    faces = host.module("nodes.host.faces")
    assert not {path.name for path in faces._yunet_files()} & {link.name, below.name}
    link.unlink()
    below.rmdir()


def test_a_face_is_pasted_where_it_was_cut_out(run):
    """Beyond the photo's edge nothing is pasted; the mask says where the new face shows."""
    photo = noise(200, 200)
    (face,), (oval,), (place,) = run("CropToFace", image=photo, bboxes=box(-20, 40, 100, 100))
    assert place["x"] < 0
    (same,) = run("PasteFace", image=photo, face=face, box=place)
    torch.testing.assert_close(same, photo, rtol=0, atol=1e-5)
    white = torch.ones(2, 64, 64, 3)  # another size, and two of them
    (pasted,) = run("PasteFace", image=photo, face=white, box=place, mask=oval)
    assert pasted.shape == (2, 200, 200, 3)
    assert (pasted[:, 90, 30] == 1).all() and torch.equal(pasted[0, :, 120:], photo[0, :, 120:])
    assert not torch.equal(pasted[0, :, :120], photo[0, :, :120])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": noise(99, 99).expand(2, -1, -1, -1)}, "one photo, one box and at most one mask, got 2"),
        ({"box": [box(0, 0, 9, 9)] * 2}, "got 1, 2"),
        ({"box": box(0, 0, 50, 60)}, "50 × 60 and not square"),
        ({"box": "face"}, "x, y, width and height"),
        ({"box": box(0, 0, float("inf"), float("inf"))}, "x, y, width and height"),
        ({"box": box(float("nan"), 0, 50, 50)}, "x, y, width and height"),
        ({"box": box(1e300, 0, 50, 50)}, "x, y, width and height"),
        ({"box": box(10**400, 0, 50, 50)}, "x, y, width and height"),
        ({"box": box(0, 0, 500_000, 500_000)}, "at most 16,384"),
        ({"mask": torch.ones(2, 9, 9)}, "got 1, 1 and 2"),
    ],
)
def test_what_cannot_be_pasted_is_said(run, error, inputs, message):
    whole = {"image": noise(99, 99), "face": noise(50, 50), "box": box(0, 0, 50, 50)}
    with pytest.raises(error, match=message):
        run("PasteFace", **{**whole, **inputs})


@pytest.mark.parametrize("side", [float("nan"), float("inf"), 500_000])
def test_a_box_that_would_fill_the_memory_is_refused(run, error, side):
    with pytest.raises(error, match=r"x, y, width and height|at most 16,384"):
        run("CropToFace", image=noise(99, 99), bboxes=box(0, 0, side, side))
