"""Prompts for the live server."""

import copy
import shutil

import pytest

from devtools.environment import CHECKPOINT, ROOT
from devtools.workflow import edited

PHOTO = ROOT / "example_workflows" / "input" / "hdb_photo.png"


@pytest.fixture
def sampling_prompt(object_info):
    """A text-to-image prompt of stock nodes on the miniature."""
    checkpoints = object_info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
    assert CHECKPOINT in checkpoints, f"{CHECKPOINT} is not among the checkpoints: {checkpoints}"
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT}),
        "2": ("CLIPTextEncode", {"clip": ["1", 1], "text": "a face"}),
        "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": ""}),
        "4": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "5": (
            "KSampler",
            {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": 0,
                "steps": 4,
                "cfg": 3.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        ),
        "6": ("VAEDecode", {"samples": ["5", 0], "vae": ["1", 2]}),
        "7": ("PreviewImage", {"images": ["6", 0]}),
    }
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}


@pytest.fixture
def training_prompt(server, object_info, sampling_prompt):
    """Node 10 learns the photo with the options of node 8, node 11 saves the person, node 12 applies it to the sampler,
    node 5."""
    shutil.copytree(PHOTO.parent, server.input, dirs_exist_ok=True)
    prompt = copy.deepcopy(sampling_prompt)

    def node(class_type, **inputs):
        defaults = {
            key: spec[1]["default"]
            for key, spec in object_info[class_type]["input"]["required"].items()
            if "default" in spec[1]
        }
        return {"class_type": class_type, "inputs": {**defaults, **inputs}}

    base = {"model": ["1", 0], "clip": ["1", 1]}
    prompt["9"] = {"class_type": "LoadImage", "inputs": {"image": PHOTO.name}}
    prompt["8"] = node("FastFinetuneOptions", batch_size=1)
    learned = {"vae": ["1", 2], "image": ["9", 0], "options": ["8", 0]}
    prompt["10"] = node("FastFinetune", **base, **learned, steps=2)
    prompt["11"] = node("SaveLiDB", lidb=["10", 0])
    prompt["12"] = node("ApplyLiDBToModel", **base, lidb=["10", 0])
    return edited(prompt, {"5": {"model": ["12", 0]}, "2": {"clip": ["12", 1], "text": "a [v] face"}})
