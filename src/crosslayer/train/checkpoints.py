"""Checkpoints that can be trusted: hashes of their files, and the newest one that is whole.

checkpoint-N/
  ...                        what transformers' Trainer writes: weights, optimizer, scheduler, random states, its state
  crosslayer_manifest.json   size and SHA-256 of every other file but the card, number of processes, its own SHA-256;
                             written last
"""

import hashlib
import json
import logging
import re
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from .run_folder import read_json, write_json
from .sharded import has_shards

MANIFEST = "crosslayer_manifest.json"
STATE = "trainer_state.json"
NOT_HASHED = (MANIFEST, "README.md")
FORMAT = 1
_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model*")
_log = logging.getLogger(__name__)


def write_manifest(folder: Path, *, processes: int, weights_only: bool) -> None:
    """Write the manifest of a finished checkpoint. Raises OSError."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_HASHED)
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_sha256, files))
    content: dict[str, Any] = {
        "format": FORMAT,
        "processes": processes,
        "weights_only": weights_only,
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, digests, strict=True)
        },
    }
    write_json(folder / MANIFEST, {**content, "sha256": _sha256_of(content)})


def checkpoint_to_resume(output_dir: Path, processes: int | None, step: int | None = None) -> Path | None:
    """The newest checkpoint that is whole, or that of `step`; None when none was finished yet. Says which ones it
    passes over, and why.

    Args:
        processes: how many have to have written it; None for any number.

    Raises CheckpointError when there are checkpoints and none of them is whole, ConfigError when it was written by
    another number of processes, and where there is none of `step`.
    """
    damaged, found = [], checkpoints(output_dir)
    if step is not None:
        steps = ", ".join(str(step_of(folder)) for folder in found) or "none"
        found = [folder for folder in found if step_of(folder) == step]
        if not found:
            raise ConfigError(f"{output_dir} has no checkpoint-{step}; there are: {steps}")
    for folder in reversed(found):
        if _is_unfinished(folder, processes):
            if step is not None:
                raise CheckpointError(f"{folder} was not written to its end; choose another")
            _log.warning("%s was not written to its end; it is passed over", folder)
            continue
        problem = damage(folder)
        if problem is not None:
            _log.warning("%s is not used: %s", folder, problem)
            damaged.append(f"{folder.name}: {problem}")
            continue
        if processes is not None:
            _check_processes(folder, processes)
        _log.warning("going on from %s", folder)
        return folder
    if damaged:
        raise CheckpointError(
            f"{output_dir} cannot be resumed: no checkpoint is whole ({'; '.join(damaged)}); put back what is missing, "
            "or start again with --overwrite or another --output_dir"
        )
    return None


def _is_unfinished(folder: Path, processes: int | None = None) -> bool:
    """Whether a run (of so many processes) was killed while it wrote this one; the manifest alone may be missing
    (`damage`)."""
    if (folder / MANIFEST).is_file():
        return False
    if read_json(folder / STATE) is None or has_shards(folder):  # shards come after the Trainer's state
        return True
    others = [read_json(other / MANIFEST) for other in checkpoints(folder.parent)]
    written = [other["processes"] for other in others if isinstance(other, dict) and "processes" in other]
    return bool(written) and 0 < len(list(folder.glob("rng_state_*"))) < (processes or max(written))


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end, None when there is none. Reads no weights: for messages."""
    finished = [
        folder
        for folder in checkpoints(Path(output_dir))
        if read_json(folder / STATE) is not None and not _is_unfinished(folder)
    ]
    return finished[-1] if finished else None


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N, oldest first; not folders that only begin like that."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def remove_old(output_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Keep `newest`, the best one and as many before it as `limit` allows; touch nothing but checkpoint-N up to it."""
    if limit is None:
        return
    found = [folder for folder in checkpoints(output_dir) if step_of(folder) <= step_of(newest)]
    protected = {newest.name} | ({Path(best).name} if best else set())
    excess = len(found) - max(limit, len(protected))
    for folder in [folder for folder in found if folder.name not in protected][: max(excess, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def keep_best(output_dir: Path, best: str, last_step: int) -> None:
    """What is left of a finished run that keeps one checkpoint: the best; folders beyond the last step are not its."""
    for folder in checkpoints(output_dir):
        if step_of(folder) <= last_step and folder.name != Path(best).name:
            shutil.rmtree(folder, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def damage(folder: Path) -> str | None:
    """What keeps a run from going on from this checkpoint, None when nothing does. Reads every file."""
    if not (folder / MANIFEST).is_file():
        return _damage_without_hashes(folder)
    manifest = read_json(folder / MANIFEST)
    try:
        if manifest["weights_only"]:
            return "it holds the weights alone (save_only_model), without optimizer, schedule and random state"
        expected: dict[str, dict[str, Any]] = manifest["files"]
        missing = [name for name in expected if not (folder / name).is_file()]
        if missing:
            return f"{', '.join(missing)} is missing"
        cut = [name for name, facts in expected.items() if (folder / name).stat().st_size != facts["bytes"]]
        if cut:
            return f"{', '.join(cut)} does not have the size that was written"
        with ThreadPoolExecutor(4) as pool:
            digests = list(pool.map(_sha256, [folder / name for name in expected]))
        changed = [
            name for (name, facts), digest in zip(expected.items(), digests, strict=True) if digest != facts["sha256"]
        ]
        own = manifest.pop("sha256", None)
        if own is not None and own != _sha256_of(manifest):
            return f"{MANIFEST} is not what was written"
    except (TypeError, KeyError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return f"{', '.join(changed)} is not what was written" if changed else _wrong_step(folder)


def _damage_without_hashes(folder: Path) -> str | None:
    """The same for a checkpoint without a manifest: of an earlier version, or of a run killed before its last file."""
    _log.warning("%s has no hashes; its files are looked at for completeness alone", folder)
    wrong = _wrong_step(folder)
    if wrong is not None:
        return wrong
    kinds = {"optimizer": "optimizer state", "scheduler": "schedule", "rng_state": "random state"}
    if not list(folder.glob("global_step*")):  # DeepSpeed keeps its own
        if not any(list(folder.glob(pattern)) for pattern in _WEIGHTS):
            return "its weights are missing"
        for name, what in kinds.items():
            if not list(folder.glob(f"{name}*")):
                return f"its {what} ({name}*) is missing"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        problem = _problem_of_file(path)
        if problem is not None:
            return f"{path.relative_to(folder)} {problem}"
    return None


def _problem_of_file(path: Path) -> str | None:
    if path.stat().st_size == 0:
        return "is empty"
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt"):
                return None
        except (SafetensorError, OSError):
            return "is cut off"
    if path.suffix in (".pt", ".pth", ".bin"):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, OSError):
            return "is cut off"
        return None if broken is None else "is not what was written"
    return None


def _wrong_step(folder: Path) -> str | None:
    state = read_json(folder / STATE)
    try:
        step = state["global_step"]
    except (TypeError, KeyError):
        return f"{STATE} cannot be read"
    return None if step == step_of(folder) else f"{STATE} is of step {step}"


def _check_processes(folder: Path, processes: int) -> None:
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        states = len(list(folder.glob("rng_state*")))
        earlier = states or processes
    else:
        earlier = manifest["processes"]
    if earlier != processes:
        raise ConfigError(
            f"{folder} was written by {earlier} processes and cannot be gone on from with {processes}: batches and "
            f"random states are theirs; start {earlier}, or give another --output_dir"
        )


def _sha256_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
