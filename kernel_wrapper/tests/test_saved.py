"""Saved tensors and caches: what comes back, and that no fault of a file gets past `saved.load`.

MUSTAFAR_FUZZ_SAVED says how many mutated files the fuzzer tries (400 by default); `python test_saved.py` is the same
target under atheris, guided by coverage, where that is installed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from mustafar import CompressedTensor, ops, reference, saved
from mustafar.cache import MustafarCache
from safetensors.torch import load_file, save_file
from tiny_models import one_thread, tiny  # noqa: F401

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = int(os.environ.get("MUSTAFAR_FUZZ_SAVED", "400"))


def sample(dtype: torch.dtype = torch.float16, tokens: int = 130) -> dict[str, saved.Entry]:
    """An entry of every kind."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, tokens, 80, generator=g).to(dtype)
    return {
        "uniform": reference.prune_compress(x, 30),
        "general": reference.compress(torch.where(x > 0.5, x, 0)),
        "window": x[:, :, :7],
    }


def same(got: saved.Entry, expected: saved.Entry) -> bool:
    if isinstance(expected, torch.Tensor):
        return got.dtype == expected.dtype and torch.equal(got, expected)
    return torch.equal(reference.decompress(got), reference.decompress(expected))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "cache.mustafar"
    saved.save(target, sample(), {"prompt": "a"})
    return target


def parts_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file, unchecked."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return load_file(path), json.loads(raw[8 : 8 + size])["__metadata__"]


def forge(path: Path, parts: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A file whose checksum fits, whatever is in it."""
    metadata = {**metadata, "sha256": saved._digest(metadata["contents"], parts)}
    save_file(parts, path, metadata)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 64, 130])
def test_round_trip(tmp_path, dtype, tokens):
    tensors = sample(dtype, tokens)
    saved.save(tmp_path / "x", tensors, {"model": "tiny"})
    got = saved.load(tmp_path / "x")
    assert list(got) == sorted(tensors) and all(same(got[name], tensors[name]) for name in tensors)
    assert saved.load_note(tmp_path / "x") == {"model": "tiny"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_slices_that_share_values_are_saved_apart(tmp_path):
    c = sample()["general"]
    twice = dataclasses.replace(
        c, **{name: getattr(c, name)[[1, 1, 0]] for name in ("bitmap", "offsets", "widths")}
    )
    saved.save(tmp_path / "x", {"beams": twice})
    assert same(saved.load(tmp_path / "x")["beams"], twice)


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        saved.save(path, sample())
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("bad", [{"": torch.zeros(1)}, {"a/b": torch.zeros(1)}])
def test_names_that_cannot_be_saved(tmp_path, bad):
    with pytest.raises(ValueError, match="names"):
        saved.save(tmp_path / "x", bad)


@pytest.mark.parametrize("bad", [torch.zeros(1, dtype=torch.int64), [1.0]])
def test_entries_that_cannot_be_saved(tmp_path, bad):
    with pytest.raises(TypeError, match="'a'"):
        saved.save(tmp_path / "x", {"a": bad})


def test_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        saved.load(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, 0.9, -1])
def test_truncated(path, keep):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(saved.SavedError, match=r"cache\.mustafar"):
        saved.load(path)


def test_longer_than_it_should_be(path):
    path.write_bytes(path.read_bytes() + b"\0" * 16)
    with pytest.raises(saved.SavedError, match="not a whole safetensors file"):
        saved.load(path)


def test_every_flipped_bit_of_the_data_is_found(path):
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    rng = random.Random(0)
    for _ in range(60):
        place, bit = rng.randrange(8 + size, len(raw)), rng.randrange(8)
        changed = bytearray(raw)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        with pytest.raises(saved.SavedError, match="checksum"):
            saved.load(path)


def test_pickles_are_not_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    for name, write in (("pickle", pickle.dump), ("torch", torch.save)):
        with open(tmp_path / name, "wb") as file:
            write(Bomb(), file)
        with pytest.raises(saved.SavedError):
            saved.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no saved mustafar tensors"),
        ({"version": "2"}, "expected version 1 of the format, got '2'"),
        ({"version": None}, "expected version 1"),
        ({"sha256": None}, "no sha256"),
        ({"contents": None}, "no contents"),
        ({"sha256": "0" * 64}, "checksum"),
    ],
)
def test_metadata(path, change, message):
    parts, metadata = parts_of(path)
    changed = {name: text for name, text in (metadata | change).items() if text is not None}
    save_file(parts, path, changed)
    with pytest.raises(saved.SavedError, match=message):
        saved.load(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no entries"),
        ('{"entries": [], "note": {}}', "no entries"),
        ('{"entries": {}, "note": {}}', "do not name"),
        ('{"entries": {"uniform": 3}, "note": {}}', "kind"),
        ('{"entries": {"uniform": {"kind": "pickle"}}, "note": {}}', "kind"),
        ('{"entries": {"other": {"kind": "dense"}}, "note": {}}', "has no dense"),
    ],
)
def test_contents(path, contents, message):
    parts, metadata = parts_of(path)
    forge(path, parts, metadata | {"contents": contents})
    with pytest.raises(saved.SavedError, match=message):
        saved.load(path)


@pytest.mark.parametrize("field", ["tokens", "head_dim"])
@pytest.mark.parametrize("value", [-1, 0, 1, 63, 65, 10**30, 1 << 62, True, 1.5, "64", None])
def test_shapes_that_do_not_fit(path, field, value):
    parts, metadata = parts_of(path)
    contents = json.loads(metadata["contents"])
    contents["entries"]["general"][field] = value
    forge(path, parts, metadata | {"contents": json.dumps(contents)})
    with pytest.raises(saved.SavedError, match="general"):
        saved.load(path)


def _set(part: str, index: tuple[int, ...], value: int):
    def change(parts: dict[str, torch.Tensor]) -> None:
        parts[part][index] = value

    return change


def _replace(part: str, make):
    def change(parts: dict[str, torch.Tensor]) -> None:
        parts[part] = make(parts[part])

    return change


def _drop(part: str):
    return lambda parts: parts.pop(part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_set("general/widths", (0, 0, 0), 1 << 30), "widths: expected 0 to 80", id="oversized width"),
        pytest.param(_set("general/widths", (0, 0, 0), 88), "widths: expected 0 to 80", id="width past the head"),
        pytest.param(_set("general/widths", (0, 0, 0), -8), "widths", id="negative width"),
        pytest.param(_set("general/widths", (0, 0, 0), 33), "widths|overlap", id="width off a vector"),
        pytest.param(_set("general/widths", (0, 0, 0), 8), "widths", id="width under the bitmap's"),
        pytest.param(_set("general/offsets", (0, 0, 1), 0), "overlap", id="overlapping offsets"),
        pytest.param(_set("general/offsets", (0, 0, 0), -64), "offsets", id="negative offset"),
        pytest.param(_set("general/offsets", (0, 0, 0), (1 << 63) - 8), "offsets", id="offset that wraps"),
        pytest.param(_set("general/offsets", (1, 1, 2), 1 << 40), "offsets", id="offset outside"),
        pytest.param(_set("general/offsets", (0, 0, 0), 4), "offsets|overlap", id="offset off a vector"),
        pytest.param(_set("general/bitmap", (0, 0, 0, 0, 0), -1), "widths|bitmap", id="full bitmap word"),
        pytest.param(_set("uniform/bitmap", (0, 0, 0, 0, 0), -1), "bitmap", id="more bits than slots"),
        pytest.param(_set("uniform/bitmap", (0, 0, 0, 0, 1), -1), "bitmap", id="bits past the head dim"),
        pytest.param(_set("uniform/bitmap", (0, 0, 2, 63, 0), 1), "bitmap", id="bits past the last token"),
        pytest.param(_replace("uniform/bitmap", lambda x: x[:, :, :2]), "bitmap.shape", id="slice missing"),
        pytest.param(_replace("uniform/bitmap", lambda x: x.int()), "bitmap.dtype", id="bitmap int32"),
        pytest.param(_replace("uniform/values", lambda x: x[:, :, :2]), "values.shape", id="values missing"),
        pytest.param(_replace("uniform/values", lambda x: x.double()), "values.dtype", id="values float64"),
        pytest.param(
            _replace("uniform/values", lambda x: x.repeat(1, 1, 1, 9, 1, 1)), "at most 80 slots", id="wide values"
        ),
        pytest.param(_replace("general/values", lambda x: x[:-8]), "offsets", id="values cut"),
        pytest.param(_replace("general/values", lambda x: x.view(-1, 8)), "values", id="values not flat"),
        pytest.param(_replace("general/offsets", lambda x: x.int()), "offsets.dtype", id="offsets int32"),
        pytest.param(_replace("general/widths", lambda x: x.long()), "widths.dtype", id="widths int64"),
        pytest.param(_replace("general/widths", lambda x: x[:1]), "widths.shape", id="widths of another batch"),
        pytest.param(_replace("window/dense", lambda x: x.long()), "window", id="dense integers"),
        pytest.param(_drop("uniform/values"), "has no values", id="no values"),
        pytest.param(_drop("general/widths"), "offsets and widths", id="no widths"),
        pytest.param(_drop("window/dense"), "has no dense", id="no window"),
    ],
)  # fmt: skip
def test_forged_with_a_fitting_checksum(path, change, message):
    parts, metadata = parts_of(path)
    change(parts)
    forge(path, {name: x.contiguous() for name, x in parts.items()}, metadata)
    with pytest.raises(saved.SavedError, match=message):
        saved.load(path)


def _header(change) -> bytes:
    data = struct.pack("<4q", 1, 2, 3, 4)
    header = {"a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
              "b": {"dtype": "I64", "shape": [2], "data_offsets": [16, 32]}}  # fmt: skip
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["b"].update(data_offsets=[0, 16]),
        lambda h: h["b"].update(data_offsets=[8, 24]),
        lambda h: h["b"].update(data_offsets=[16, 1 << 60]),
        lambda h: h["b"].update(data_offsets=[32, 16]),
        lambda h: h["b"].update(shape=[1 << 62, 8]),
        lambda h: h["b"].update(dtype="P64"),
        lambda h: h.pop("a"),
    ],
    ids=["same bytes", "overlap", "past the end", "backwards", "huge shape", "unknown dtype", "hole"],
)
def test_headers(tmp_path, change):
    (tmp_path / "x").write_bytes(_header(change))
    with pytest.raises(saved.SavedError, match="x: "):
        saved.load(tmp_path / "x")


# --- caches --------------------------------------------------------------------------------------------------


def steps(model, cache: MustafarCache, first: int, count: int) -> torch.Tensor:
    """Logits of `count` decode steps whose tokens depend on the position alone."""
    logits = []
    for position in range(first, first + count):
        token = torch.tensor([[position % 90], [position * 7 % 90]])
        logits.append(model(token, past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


def new_cache(model, **options) -> MustafarCache:
    options = {"k_sparsity": 0.7, "v_sparsity": 0.5, "flush_every": 16} | options
    return MustafarCache(model.config, **options)


@torch.no_grad()
@pytest.mark.parametrize("v_rule", ["Vt_Mag", "Vc_Mag"])
@pytest.mark.parametrize("length", [5, 150, 340])
def test_a_loaded_cache_goes_on_alike(tmp_path, length, v_rule):
    model = tiny("llama")
    cache, again = (new_cache(model, v_rule=v_rule) for _ in range(2))
    model(torch.arange(2 * length).view(2, -1) % 90, past_key_values=cache)
    steps(model, cache, length, 3)
    saved.save_cache(tmp_path / "x", cache)
    saved.load_cache(tmp_path / "x", again)
    assert again.get_seq_length() == length + 3
    expected = steps(model, cache, length + 3, 40)  # past two flushes
    assert torch.equal(steps(model, again, length + 3, 40), expected)


@torch.no_grad()
def test_caches_that_do_not_fit(tmp_path):
    model = tiny("llama")
    cache, path = new_cache(model), tmp_path / "x"
    saved.save_cache(path, cache)  # an empty one is fine
    saved.load_cache(path, new_cache(model))
    model(torch.arange(400).view(2, -1) % 90, past_key_values=cache)
    saved.save_cache(path, cache)
    with pytest.raises(saved.SavedError, match="3 layers, got 2"):
        saved.load_cache(path, new_cache(tiny("llama", num_hidden_layers=3)))
    with pytest.raises(saved.SavedError, match="another rule or to another sparsity"):
        saved.load_cache(path, new_cache(model, k_sparsity=0.2))
    with pytest.raises(saved.SavedError, match="another rule or to another sparsity"):
        saved.load_cache(path, new_cache(model, v_rule="Vc_Mag"))
    with pytest.raises(ValueError, match="without tokens"):
        saved.load_cache(path, cache)
    with pytest.raises(ValueError, match="not saved"):
        saved.load_cache(path, new_cache(model, backend="simulate"))
    with pytest.raises(saved.SavedError, match="no cache"):
        saved.save(path, sample())
        saved.load_cache(path, new_cache(model))


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda note: note["layers"][0].pop(),
        lambda note: note["layers"][0][0].update(tokens=3),
        lambda note: note["layers"][1][1].update(pruned=-1),
        lambda note: note["layers"][1][1].update(pruned="9"),
        lambda note: note["layers"].__setitem__(0, []),
        lambda note: note["layers"].__setitem__(0, 7),
    ],
)
def test_counts_that_do_not_fit(tmp_path, change):
    model = tiny("llama")
    cache, path = new_cache(model), tmp_path / "x"
    model(torch.arange(400).view(2, -1) % 90, past_key_values=cache)
    saved.save_cache(path, cache)
    tensors, note = saved.load(path), saved.load_note(path)
    change(note)
    saved.save(path, tensors, note)
    with pytest.raises(saved.SavedError, match="x: "):
        saved.load_cache(path, new_cache(model))


# --- fuzzing -------------------------------------------------------------------------------------------------


def use(tensors: dict[str, saved.Entry]) -> None:
    """What the loader lets pass must be safe to work with."""
    for entry in tensors.values():
        if isinstance(entry, CompressedTensor):
            assert torch.equal(
                ops.compress(ops.decompress(entry)).bitmap, ops.compress(reference.decompress(entry)).bitmap
            )


def try_file(path: Path, raw: bytes, fix_checksum: bool) -> bool:
    """Load the bytes; True where they pass. With `fix_checksum` the checksum is made to fit first, if it can be."""
    path.write_bytes(raw)
    if fix_checksum:
        try:
            forge(path, *parts_of(path))
        except Exception:  # not even safetensors: as it is
            path.write_bytes(raw)
    try:
        tensors = saved.load(path)
    except saved.SavedError:
        return False
    use(tensors)
    return True


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """A few changes of bits, bytes, numbers, pieces and digits."""
    data = bytearray(raw)
    (size,) = struct.unpack("<Q", raw[:8])
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(min(8 + size, len(data))) if rng.random() < 0.5 else rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, ord("0"), ord("9"), ord("-"), ord('"')])
            case 2:
                del data[place : place + rng.choice([1, 8, 64])]
            case 3:
                data[place:place] = data[place : place + rng.choice([1, 8, 64])]
            case 4:
                number = rng.choice(
                    [0, 1, 8, 255, 1 << 31, (1 << 63) - 8, (1 << 64) - 1, rng.getrandbits(64)]
                )
                data[place : place + 8] = struct.pack("<Q", number)
            case 5:
                digits = [i for i, byte in enumerate(data[: 8 + size]) if 48 <= byte <= 57]
                if digits:
                    data[rng.choice(digits)] = rng.randrange(48, 58)
    return bytes(data)


@pytest.mark.parametrize("fix_checksum", [False, True])
def test_mutated_files(path, fix_checksum):
    raw = path.read_bytes()
    for number in range(CASES // 2):
        try:
            try_file(path, mutate(raw, random.Random(number)), fix_checksum)
        except Exception as error:
            error.add_note(f"mutation {number}")
            raise


if __name__ == "__main__":
    import inspect
    import tempfile

    import atheris
    import mustafar.format

    folder = Path(tempfile.mkdtemp())
    for module in (saved, mustafar.format):
        for name, function in list(vars(module).items()):
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                setattr(module, name, atheris.instrument_func(function))
    corpus = folder / "corpus"
    corpus.mkdir()
    saved.save(corpus / "all", sample())
    saved.save(corpus / "small", {"u": reference.prune_compress(torch.randn(1, 1, 1, 8), 3)})

    def one(raw: bytes) -> None:
        if raw:
            try_file(folder / "x", raw[1:], raw[0] % 2 == 1)

    for seed in corpus.iterdir():
        seed.write_bytes(b"\1" + seed.read_bytes())
    atheris.Setup([*sys.argv, str(corpus)], one)
    atheris.Fuzz()
