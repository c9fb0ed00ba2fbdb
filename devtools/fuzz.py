"""Damages our files and loads them: `python -m devtools.fuzz --seed 1 --count 10000`.

Every damaged file must be refused with an error of the pack's own, or be a file that a writer could have written: what
it loads to is saved and loaded again without a change. Damage that the checksum covers is done twice, with the old
checksum and with an honest one, so that the checks behind it are reached.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hdb_core.basis import BasisRecipe, layer_basis
from hdb_core.errors import HDBError
from hdb_core.files import basis as basis_file
from hdb_core.files import container
from hdb_core.files import hypernet as hypernet_file
from hdb_core.files import lidb as lidb_file
from hdb_core.hypernet import EncoderConfig, HyperNet, HyperNetConfig
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import About, LiDB
from hdb_core.train import state as state_file
from hdb_core.train.run import Run
from hdb_core.train.settings import Settings, flat

MOST_SECONDS = 1.0  # to refuse or to read a file of less than 1 MB
_DEEP = 100_000
# Of every type of JSON, sensible and absurd.
ABSURD: tuple[Any, ...] = (
    None, True, False, "", "x", "ä" * 300, "1", -1, 0, 1, 2, 3, 7, 65_537, 2**31, 2**63, 2**70, 10**400, -0.5, 1e308, float("nan"),
    float("inf"), [], [None], [[]], ["x"], [1, 2], [1] * 5000, {}, {"x": 1}, {"": None},
)  # fmt: skip
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "X", "")

Damage = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        kind: as its module describes it; None for JSON.
        make: writes an honest one.
        load: reads it.
        save: writes what `load` returned.
        values: of what `load` returned, to be compared.
        rounding: what another save and load may change a number by.
    """

    kind: container.FileKind | None
    make: Callable[[Path], object]
    load: Callable[[Path], Any]
    save: Callable[[Any, Path], object]
    values: Callable[[Any], Any]
    rounding: float = 1e-5


def small_layout() -> Layout:
    """An attention and a convolution of a UNet, and a text layer."""
    block = "unet.down_blocks.0"
    attention = f"{block}.attentions.0.transformer_blocks.0.attn2"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    return Layout("sd1", (Layer(f"{attention}.to_q", 32, 32), Layer(f"{attention}.to_k", 24, 32), Layer(text, 24, 24),
                          Layer(f"{block}.resnets.0.conv1", 36, 8)))  # fmt: skip


def small_lidb() -> LiDB:
    """A random person."""
    layout, basis, generator = small_layout(), BasisRecipe(3, 12, 8), torch.Generator().manual_seed(0)
    down, up = (torch.randn(4, *size, generator=generator) for size in ((2, 12), (8, 2)))
    return LiDB(layout, basis, down, up, About(photos=2, steps=40, name="Anna", model="SD15"))


def small_hypernet() -> HyperNet:
    """An untrained hypernetwork."""
    encoder = EncoderConfig(image_size=16, token_width=8, patch_size=8, stem=((8, 1),), depth=1, heads=2)
    return HyperNet.create(HyperNetConfig(small_layout(), BasisRecipe(3, 12, 8), encoder, 8, 1, 2, code=3))


def small_basis() -> tuple[Layout, BasisRecipe]:
    """A basis as if it were learned."""
    layout, recipe = small_layout(), BasisRecipe(3, 12, 8)
    return layout, replace(recipe, bases={layer.name: layer_basis(recipe, layer) for layer in layout.layers})


def save_basis(basis: tuple[Layout, BasisRecipe], path: Path) -> None:
    layout, recipe = basis
    basis_file.save(layout, recipe.bases or {}, (recipe.down_dim, recipe.up_dim), path, {"people": "3"})


class Training(NamedTuple):
    """What a training goes on from."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int


SIZES = {"rank": 1, "prompt": "a [v] face", "encoder": {"depth": 1}}


def small_training() -> Training:
    """A training before its first step."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW([{"params": net[0].parameters()}, {"params": net[1].parameters(), "lr": 0.1}])
    return Training(net, optimizer, {name: weight.clone() for name, weight in net.state_dict().items()}, 0)


def begun_training() -> Training:
    """A training after a step."""
    training = small_training()
    training.net(torch.ones(4, 3)).square().sum().backward()
    training.optimizer.step()
    return training._replace(step=1)


def load_state(path: Path) -> Training:
    training = small_training()
    return training._replace(step=state_file.restore(path, *training[:3], SIZES))


def save_state(training: Training, path: Path) -> None:
    state_file.write(path, *training, SIZES)


def training_values(training: Training) -> Any:
    moments = [own for _, own in sorted(training.optimizer.state_dict()["state"].items())]
    return training.step, training.net.state_dict(), training.average, moments


def load_config(path: Path) -> Settings:
    return Run.open(_as_run(path), {}).settings


def save_config(settings: Settings, path: Path) -> None:
    Run(folder := path.with_suffix(".run"), settings).write_settings()
    (folder / "config.json").replace(path)


def _as_run(path: Path) -> Path:
    """A run's folder with this file of settings."""
    (folder := path.with_suffix(".run")).mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(path.read_bytes())
    return folder


def lidb_values(lidb: LiDB) -> Any:
    return lidb.layout, lidb.basis, lidb.about, lidb.up @ lidb.down


TARGETS: Mapping[str, Target] = {
    "lidb": Target(
        lidb_file.KIND,
        lambda path: lidb_file.save(small_lidb(), path, rank=2, bits=lidb_file.COMPACT),
        lidb_file.load,
        lambda lidb, path: lidb_file.save(lidb, path, bits=lidb_file.FULL),
        lidb_values,
    ),
    "hypernet": Target(
        hypernet_file.KIND,
        lambda path: hypernet_file.save(small_hypernet(), path, {"people": "3"}),
        hypernet_file.load,
        lambda net, path: hypernet_file.save(net, path, {}, torch.float32),
        lambda net: (net.config, net.state_dict()),
    ),
    "basis": Target(
        basis_file.KIND,
        lambda path: save_basis(small_basis(), path),
        basis_file.load,
        save_basis,
        lambda basis: (basis[0], basis[1].down_dim, basis[1].up_dim, basis[1].bases),
        1e-3,  # its float16 numbers are made orthonormal again
    ),
    "state": Target(
        state_file.KIND, lambda path: save_state(begun_training(), path), load_state, save_state, training_values
    ),
    "config": Target(
        None,
        lambda path: save_config(Settings(model="model.safetensors", photos="photos"), path),
        load_config,
        save_config,
        flat,
    ),
}


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the rest."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, rest: bytes) -> bytes:
    """The opposite of `split`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in JSON, at any depth; of a long list to its first three items."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:3]))
    return [way for key, item in items for way in ((*here, key), *paths(item, (*here, key)))]


def replaced(value: Any, way: tuple[Any, ...], new: Any) -> None:
    """Puts a value at the end of a way; `...` removes what is there."""
    for key in way[:-1]:
        value = value[key]
    if new is ...:
        del value[way[-1]]
    else:
        value[way[-1]] = new


def nested(depth: int) -> bytes:
    """JSON of lists in lists."""
    return b"[" * depth + b"]" * depth


@st.composite
def damaged_json(draw: st.DrawFn, honest: bytes) -> bytes:
    """A damaged copy of a JSON file."""
    how = draw(st.sampled_from(("bytes", "cut", "insert", "remove", "fields", "fields", "fields", "fields", "deep")))
    if how == "deep":
        deep = nested(draw(st.sampled_from((900, 5000, _DEEP))))
        return draw(st.sampled_from((deep, honest.replace(b"{", b'{"deep": ' + deep + b", ", 1))))
    if how != "fields":
        return _damaged_bytes(draw, honest, how)
    fields = json.loads(honest)
    for _ in range(draw(st.integers(1, 2))):
        _change(draw, fields, st.one_of(st.sampled_from(ABSURD), st.integers(), st.floats(), st.text(max_size=5)))
    return json.dumps(fields, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def damage(draw: st.DrawFn, honest: bytes, key: str) -> bytes:
    """A damaged copy of a file.

    Args:
        draw: of Hypothesis.
        honest: the file.
        key: of our header.
    """
    how = draw(
        st.sampled_from(
            ("bytes", "cut", "insert", "remove", "entries", "fields", "fields", "fields", "tensors", "deep")
        )
    )
    if how in ("bytes", "cut", "insert", "remove"):
        return _damaged_bytes(draw, honest, how)
    header, rest = split(honest)
    if how == "entries":
        _change(draw, header, st.one_of(st.sampled_from(ABSURD), st.sampled_from(_DTYPES), st.integers()))
        return joined(header, rest)
    if how == "deep":
        return _nested(draw, header, rest, key)
    fields, tensors = json.loads(header["__metadata__"][key]), safetensors.torch.load(honest)
    if how == "fields":
        for _ in range(draw(st.integers(1, 2))):
            _change(draw, fields, st.one_of(st.sampled_from(ABSURD), st.integers(), st.floats(), st.text(max_size=5)))
    else:
        _change_tensors(draw, tensors)
    if draw(st.integers(0, 3)):
        fields["checksum"] = container.checksum(fields, tensors)
    return safetensors.torch.save(tensors, {key: json.dumps(fields)})


def _damaged_bytes(draw: st.DrawFn, honest: bytes, how: str) -> bytes:
    place, run = draw(st.integers(0, len(honest) - 1)), draw(st.binary(min_size=1, max_size=40))
    if how == "cut":
        return honest[:place]
    end = place + {"bytes": len(run), "insert": 0, "remove": draw(st.integers(1, 500))}[how]
    return honest[:place] + (b"" if how == "remove" else run) + honest[end:]


def _change(draw: st.DrawFn, value: Any, new: st.SearchStrategy[Any]) -> None:
    """Another value, a missing one, or one too many, anywhere in JSON."""
    ways = paths(value)
    way = draw(st.sampled_from(ways)) if ways else ("new",)
    how = draw(st.sampled_from(("replace", "replace", "remove", "add")))
    if how == "add":
        way = (*way[:-1], draw(st.sampled_from(("new", "", "__class__")))) if isinstance(way[-1], str) else way
    # A copy: what is drawn may be changed by the next damage.
    replaced(value, way, ... if how == "remove" and ways else copy.deepcopy(draw(new)))


def _nested(draw: st.DrawFn, header: dict[str, Any], rest: bytes, key: str) -> bytes:
    deep = nested(draw(st.sampled_from((900, 5000, _DEEP))))
    where = draw(st.sampled_from(("all", "metadata", "field")))
    if where == "all":
        return joined(deep.replace(b"[", b'{"a":', 1)[:-1] + b"}", rest)
    if where == "metadata":
        return joined({**header, "__metadata__": {key: deep.decode()}}, rest)
    text = header["__metadata__"][key].replace("{", '{"deep": ' + deep.decode() + ", ", 1)
    return joined({**header, "__metadata__": {key: text}}, rest)


def _change_tensors(draw: st.DrawFn, tensors: dict[str, Tensor]) -> None:
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    how = draw(st.sampled_from(("remove", "rename", "shape", "dtype", "values", "empty", "scalar", "add")))
    changed: dict[str, Callable[[], Tensor]] = {
        "rename": lambda: tensor,
        "shape": lambda: tensor.flatten().repeat(draw(st.integers(1, 3)))[draw(st.integers(0, 3)) :].clone(),
        "dtype": lambda: tensor.float().to(draw(st.sampled_from((torch.float64, torch.int8, torch.bool, torch.float16)))),
        "values": lambda: torch.full_like(tensor, draw(st.sampled_from((0.0, 1e4, float("nan"), float("inf")))))
        if tensor.is_floating_point() else torch.full_like(tensor, draw(st.sampled_from((0, 1, 255)))),
        "empty": lambda: tensor.flatten()[:0].clone(),
        "scalar": lambda: tensor.flatten()[0].clone(),
        "add": lambda: tensor,
    }  # fmt: skip
    if how in changed:
        tensors[f"{name}2" if how == "rename" else name] = changed[how]()
    if how == "add":
        tensors["another"] = torch.zeros(2)


class Broken(AssertionError):
    """A damaged file that did more harm than to be refused."""


def judge(target: Target, data: bytes, path: Path) -> str:
    """Loads a damaged file: "refused" or "accepted".

    Raises:
        Broken: any other error, a value that is not kept by another save and load, or too much time.
    """
    path.write_bytes(data)
    start = time.process_time()
    try:
        loaded = target.load(path)
    except HDBError as error:
        if not 20 < len(str(error)) < 1000:
            raise Broken(f"a message of {len(str(error))} characters") from error
        result, loaded = "refused", None
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {error}") from error
    if (taken := time.process_time() - start) > MOST_SECONDS:
        raise Broken(f"{taken:.1f} s")
    if loaded is not None:
        result = "accepted"
        again = path.with_name("again.safetensors")
        target.save(loaded, again)
        if not same(target.values(target.load(again)), target.values(loaded), target.rounding):
            raise Broken("what was loaded is not what is loaded after saving it")
    return result


def same(one: Any, other: Any, rounding: float) -> bool:
    """Whether two values are alike but for the rounding of tensors."""
    if isinstance(one, Tensor):
        return torch.allclose(one, other, rtol=1e-3, atol=rounding)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name], rounding) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair, rounding) for pair in zip(one, other, strict=True))
    return one == other


def run(name: str, count: int, number: int, folder: Path) -> Counter[str]:
    """Loads so many damaged files of a kind; how many were refused and accepted.

    Raises:
        Broken: with the smallest example that Hypothesis finds, which is left in the folder.
    """
    target, counts = TARGETS[name], Counter[str]()
    original = folder / f"{name}.safetensors"
    target.make(original)
    data = original.read_bytes()

    @seed(number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(damage(data, target.kind.key) if target.kind else damaged_json(data))
    def load_damaged(damaged: bytes) -> None:
        counts[judge(target, damaged, folder / f"damaged_{name}.safetensors")] += 1

    load_damaged()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m devtools.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000, help="damaged files of each kind; default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)  # what is measured is the work, not how long others keep the cores
    with tempfile.TemporaryDirectory() as folder:
        for name in args.kinds:
            start = time.monotonic()
            counts = run(name, args.count, args.seed, Path(folder))
            print(f"{name}: {dict(counts)} in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
