"""Compressed tensors and caches in files that are checked before anything uses them.

A file is safetensors, so reading it executes nothing. Its metadata has the version of this format, what each entry
is, and a SHA-256 over names, dtypes, shapes and bytes. `load` refuses whatever is truncated, changed, of another
version or inconsistent with `SavedError`, which names file and fault. Checks of shapes, bitmaps, widths and offsets
do not rely on the checksum, as whoever makes a hostile file can make one that fits. What `load` returns no kernel can
read out of bounds.

    saved.save("prompt.mustafar", {"k": compressed_keys, "v": compressed_values})
    tensors = saved.load("prompt.mustafar")
    saved.save_cache("prompt.mustafar", cache)               # a MustafarCache after a prompt
    saved.load_cache("prompt.mustafar", MustafarCache(config, k_sparsity=0.7, v_sparsity=0.7))
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mustafar.format import DTYPES, MAX_HEAD_DIM, SLICE_TOKENS, CompressedTensor, slices_for, width_for

if TYPE_CHECKING:
    from mustafar.cache import MustafarCache
    from mustafar.history import PackedHistory

FORMAT, VERSION = "mustafar", "1"
MAX_TOKENS = 1 << 40  #: of a sequence; sizes in bytes then fit 64 bits by far
Entry = CompressedTensor | torch.Tensor


class SavedError(ValueError):
    """A file that cannot be used, with the reason."""


def save(path: str | os.PathLike[str], tensors: dict[str, Entry], note: dict[str, Any] | None = None) -> None:
    """Write compressed and dense tensors by name, and a JSON-able note. A file of that name is replaced as a whole.

    Parameters
    ----------
    path : path
    tensors : dict
        `CompressedTensor` of either layout, or dense float16, bfloat16 or float32 tensors. Names have no `/`.
    note : dict, optional
        Returned by `load_note`.
    """
    path, parts, contents = Path(path), {}, {}
    for name, entry in tensors.items():
        if not name or "/" in name:
            raise ValueError(f"tensors: names must not be empty nor have a '/', got {name!r}")
        if isinstance(entry, CompressedTensor):
            entry = _compact(entry.validate())
            contents[name] = {"kind": "compressed", "tokens": entry.tokens, "head_dim": entry.head_dim}
            parts |= {f"{name}/{part}": x for part, x in entry.state_dict().items() if part != "shape"}
        elif isinstance(entry, torch.Tensor) and entry.dtype in DTYPES:
            contents[name] = {"kind": "dense"}
            parts[f"{name}/dense"] = entry
        else:
            got = entry.dtype if isinstance(entry, torch.Tensor) else type(entry).__name__
            raise TypeError(
                f"tensors[{name!r}]: expected a CompressedTensor or a tensor of {DTYPES}, got {got}"
            )
    # Views may share memory, which safetensors refuses.
    parts = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in parts.items()}
    text = json.dumps({"entries": contents, "note": note or {}}, sort_keys=True)
    metadata = {"format": FORMAT, "version": VERSION, "contents": text, "sha256": _digest(text, parts)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        save_file(parts, temporary, metadata)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, Entry]:
    """What `save` wrote, checked.

    Raises
    ------
    SavedError
        Naming the file, the entry and what is wrong with it.
    OSError
        If the file cannot be read at all.
    """
    return _load(Path(path), device)[0]


def load_note(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The note in a file, which is checked as a whole."""
    return _load(Path(path), "cpu")[1]


def save_cache(path: str | os.PathLike[str], cache: MustafarCache) -> None:
    """Write what a `MustafarCache` holds: the compressed tokens and the dense window of every layer."""
    tensors: dict[str, Entry] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        histories = _packed_histories(layer, index)
        layers.append([{"tokens": h.tokens, "pruned": h.pruned} for h in histories])
        for name, history in zip(("key", "value"), histories, strict=bool(histories)):
            tensors[f"layers.{index}.{name}"] = history.packed()
            tensors[f"layers.{index}.{name}_window"] = history.window[:, :, : history.window_tokens]
    save(path, tensors, {"layers": layers})


def load_cache(
    path: str | os.PathLike[str], cache: MustafarCache, device: str | torch.device = "cpu"
) -> None:
    """Fill a new `MustafarCache` of the same model and settings with what `save_cache` wrote.

    Raises
    ------
    SavedError
        If the file is no saved cache, or one of another number of layers, or pruned by other rules or sparsities.
    ValueError
        If the cache holds tokens already, or is of a kind that is not saved.
    """
    tensors, note = _load(Path(path), device)
    layers = note.get("layers")
    if not isinstance(layers, list) or len(layers) != len(cache.layers):
        found = len(layers) if isinstance(layers, list) else "no cache"
        raise SavedError(f"{path}: expected a cache of {len(cache.layers)} layers, got {found}")
    expected = [f"layers.{i}.{n}" for i, counts in enumerate(layers) if counts
                for n in ("key", "key_window", "value", "value_window")]  # fmt: skip
    if sorted(expected) != sorted(tensors):
        raise SavedError(f"{path}: expected the entries {expected}, got {sorted(tensors)}")
    for index, (layer, counts) in enumerate(zip(cache.layers, layers, strict=True)):
        if layer.get_seq_length():
            raise ValueError(
                f"cache: expected one without tokens, got {layer.get_seq_length()} in layer {index}"
            )
        if counts:
            parts = [tensors[f"layers.{index}.{name}"] for name in ("key", "value")]
            windows = [tensors[f"layers.{index}.{name}_window"] for name in ("key", "value")]
            _check_layer(f"{path}: layers.{index}", parts, windows, counts)
    for index, (layer, counts) in enumerate(zip(cache.layers, layers, strict=True)):
        if not counts:
            continue
        windows = [tensors[f"layers.{index}.{name}_window"] for name in ("key", "value")]
        layer.lazy_initialization(*windows)
        for name, history, window, count in zip(
            ("key", "value"), _packed_histories(layer, index), windows, counts, strict=True
        ):
            part = tensors[f"layers.{index}.{name}"]
            store = history.store
            if part.is_uniform != store.is_uniform or (
                part.is_uniform and part.values.shape[3] != store.values.shape[3]
            ):
                raise SavedError(
                    f"{path}: layers.{index}.{name}: pruned by another rule or to another sparsity than this cache's"
                )
            store.append(part)
            history.tokens = store.tokens
            history.append(window)
            history.pruned = count["pruned"]


def _packed_histories(layer: Any, index: int) -> tuple[PackedHistory, ...]:
    from mustafar.history import PackedHistory

    histories = getattr(layer, "histories", None)
    if (
        histories is None
        or getattr(layer, "simulate", False)
        or getattr(getattr(layer, "settings", None), "observes", True)
        or not all(isinstance(h, PackedHistory) for h in histories)
    ):
        raise ValueError(
            f"cache: layer {index} is a {type(layer).__name__} that is not saved: only dynamic caches "
            "on the kernels, with rules that do not observe queries, can be"
        )
    return histories


def _check_layer(name: str, parts: list[Entry], windows: list[Entry], counts: list[dict[str, int]]) -> None:
    if not isinstance(counts, list) or len(counts) != 2:
        raise SavedError(f"{name}: expected the counts of keys and values, got {counts!r}")
    for part, window, count in zip(parts, windows, counts, strict=True):
        if (
            not isinstance(part, CompressedTensor)
            or not isinstance(window, torch.Tensor)
            or window.dim() != 4
        ):
            raise SavedError(f"{name}: expected compressed tokens and a window [B, Hkv, T, D]")
        lead = (*part.shape[:2], window.shape[2], part.head_dim)
        if tuple(window.shape) != lead or window.dtype != part.dtype or part.tokens % SLICE_TOKENS:
            raise SavedError(f"{name}: the window {tuple(window.shape)} does not follow {part.shape}")
        if not isinstance(count, dict) or not all(_is_count(count.get(n)) for n in ("tokens", "pruned")):
            raise SavedError(f"{name}: expected counts of tokens and pruned ones, got {count!r}")
        total = part.tokens + window.shape[2]
        if count["tokens"] != total or not part.tokens <= count["pruned"] <= total:
            raise SavedError(f"{name}: {total} tokens do not agree with the counts {count}")
    if parts[0].shape[:3] != parts[1].shape[:3] or windows[0].shape[:3] != windows[1].shape[:3]:
        raise SavedError(f"{name}: keys and values of different shapes")


def _compact(c: CompressedTensor) -> CompressedTensor:
    """The general layout with every slice's values once and in order: slices of a batch may have shared them."""
    if c.is_uniform or not c.offsets.numel():
        return c
    sizes = c.widths.flatten().long() * SLICE_TOKENS
    starts = sizes.cumsum(0) - sizes
    pieces = zip(c.offsets.flatten().tolist(), sizes.tolist(), strict=True)
    values = torch.cat([c.values[start : start + size] for start, size in pieces])
    return dataclasses.replace(c, values=values, offsets=starts.view_as(c.offsets))


def _digest(text: str, parts: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the contents and of all tensors, by name."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(parts):
        x = parts[name]
        digest.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        if x.numel():
            digest.update(memoryview(x.contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _load(path: Path, device: str | torch.device) -> tuple[dict[str, Entry], dict[str, Any]]:
    with open(path, "rb"):  # what the system says of a file that cannot be read
        pass
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            text = _check_metadata(path, metadata)
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SavedError(f"{path}: not a whole safetensors file: {error}") from error
    if _digest(text, parts) != metadata["sha256"]:
        raise SavedError(f"{path}: the checksum differs: the file has been changed since it was saved")
    entries, note = _check_contents(path, text)
    tensors = {name: _entry(f"{path}: {name}", name, entry, parts) for name, entry in entries.items()}
    if parts:
        raise SavedError(f"{path}: entries that the contents do not name: {sorted(parts)}")
    return {name: x.to(device) for name, x in tensors.items()}, note


def _check_metadata(path: Path, metadata: dict[str, str]) -> str:
    if metadata.get("format") != FORMAT:
        raise SavedError(f"{path}: no saved mustafar tensors: its metadata has no format {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise SavedError(f"{path}: expected version {VERSION} of the format, got {metadata.get('version')!r}")
    missing = {"contents", "sha256"} - set(metadata)
    if missing:
        raise SavedError(f"{path}: the metadata has no {' nor '.join(sorted(missing))}")
    return metadata["contents"]


def _check_contents(path: Path, text: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SavedError(f"{path}: the contents are no JSON: {error}") from error
    if not isinstance(contents, dict) or not all(
        isinstance(contents.get(n), dict) for n in ("entries", "note")
    ):
        raise SavedError(f"{path}: the contents have no entries and note")
    return contents["entries"], contents["note"]


def _is_count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= MAX_TOKENS


def _entry(where: str, name: str, entry: Any, parts: dict[str, torch.Tensor]) -> Entry:
    """The entry, its tensors taken out of `parts`."""

    def take(part: str, optional: bool = False) -> torch.Tensor | None:
        tensor = parts.pop(f"{name}/{part}", None)
        if tensor is None and not optional:
            raise SavedError(f"{where}: has no {part}")
        return tensor

    kind = entry.get("kind") if isinstance(entry, dict) else None
    if kind == "dense":
        tensor = take("dense")
        if tensor.dtype not in DTYPES:
            raise SavedError(f"{where}: expected float16, bfloat16 or float32, got {tensor.dtype}")
        return tensor
    if kind != "compressed":
        raise SavedError(f"{where}: expected the kind 'compressed' or 'dense', got {kind!r}")
    tokens, head_dim = entry.get("tokens"), entry.get("head_dim")
    if not _is_count(tokens) or not _is_count(head_dim) or not 0 < head_dim <= MAX_HEAD_DIM:
        raise SavedError(f"{where}: expected tokens and a head_dim of 1 to {MAX_HEAD_DIM}, got {entry!r}")
    c = CompressedTensor(
        take("bitmap"), take("values"), take("offsets", True), take("widths", True), tokens, head_dim
    )
    try:
        c.validate(contents=False)
        _check_slots(c)
        return c.validate()
    except ValueError as error:
        raise SavedError(f"{where}: {error}") from error


def _check_slots(c: CompressedTensor) -> None:
    """Widths that a row can need, and slices that lie inside the values, one behind another."""
    most = width_for(c.head_dim)
    if c.is_uniform:
        if c.values.shape[3] * 8 > most:
            raise ValueError(
                f"values.shape: expected at most {most} slots a row, got {c.values.shape[3] * 8}"
            )
        return
    assert c.offsets.shape[2] == slices_for(c.tokens)
    widths, offsets = c.widths.flatten().long(), c.offsets.flatten()
    if not bool(((widths >= 0) & (widths <= most)).all()):
        raise ValueError(
            f"widths: expected 0 to {most} slots a row, got {int(widths.min())} to {int(widths.max())}"
        )
    # Before any sum: a large offset would wrap around.
    if not bool(((offsets >= 0) & (offsets <= c.values.numel())).all()):
        raise ValueError(f"offsets: expected 0 to {c.values.numel()}, got others")
    order = offsets.argsort(stable=True)
    ends = (offsets + widths * SLICE_TOKENS)[order]
    held = widths[order] > 0  # an empty slice may lie anywhere
    starts, ends = offsets[order][held], ends[held]
    if not bool((ends[:-1] <= starts[1:]).all()):
        raise ValueError("offsets: expected slices that do not overlap, got some that do")
