"""Checkpoints of a training run: a file with everything that the next step depends on, replaced only as a whole."""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from labutils.benchmark.environment import differences
from labutils.machine import files

FORMAT = 3
"""The version of the file's format. A file of another version is refused."""

CONTENT: dict[str, type | tuple[type, ...]] = {
    "settings": dict,
    "environment": (dict, type(None)),
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "batches": dict,
    "random": dict,
    "steps": int,
    "rows": list,
}
"""What a file has besides its format: key -> type of the value."""


def check_path(path: str | Path, *, resume: bool) -> None:
    """Raises if a run can neither start a new file at this path nor continue from one, as `resume` says.

    Args:
        path: path of the checkpoint.
        resume: True: the run continues from it. False: the run starts a new file.

    Raises:
        FileExistsError: the file exists, without `resume`.
        FileNotFoundError: `resume`, and there is no file.
    """
    there = Path(path).exists()
    if there and not resume:
        raise FileExistsError(
            f"{path} is there already: go on from it with --resume, name another folder, or delete it."
        )
    if resume and not there:
        raise FileNotFoundError(f"there is no {path} to go on from: start without --resume.")


def _read(path: Path) -> dict[str, Any]:
    """The content of a file that `Checkpoint.save` wrote: only tensors and plain values, so a file cannot run code."""

    def damaged(how: str) -> ValueError:
        return ValueError(
            f"{path} is damaged, or no checkpoint of this lab ({how}): restore it, or start without --resume in "
            "another folder."
        )

    try:
        # PyTorch stores a checksum of each part, but its reader does not compare them.
        with zipfile.ZipFile(path) as parts:
            wrong = parts.testzip()
        stored = None if wrong else torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the readers may fail in any way on garbage: BadZipFile, RuntimeError, IndexError, ...
        raise damaged(f"{type(error).__name__} while it was read") from error
    if wrong:
        raise damaged(f"the checksum of its part {wrong} is wrong")
    if not isinstance(stored, dict) or "format" not in stored:
        raise damaged("it has no format")
    if stored.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {stored.get('format')}, and this version of the lab reads {FORMAT}: go on with the "
            "version that wrote it, or start without --resume in another folder."
        )
    if unusable := [key for key, kind in CONTENT.items() if not isinstance(stored.get(key, damaged), kind)]:
        raise damaged(f"nothing that can be used under {', '.join(unusable)}")
    if stored["steps"] < 0 or not all(isinstance(row, dict) for row in stored["rows"]):
        raise damaged("its steps or rows are impossible")
    return stored


class Checkpoint:
    """A file from which training continues as if it had never stopped.

    It holds the weights, the state of the optimizer and of the loss scaler, the position in the data, the number of
    steps and the rows of the history. It also holds the random generators of Python, of PyTorch and of each GPU.

    Args:
        path: the file; its folder is made if missing. The file is replaced as a whole, so a kill leaves the one before.
        every: steps between two checkpoints. Another one is written at the end, and when `train` is asked to stop.
        settings: settings that must not change between runs: model, data, learning rate, ...
        environment: the machine and the software, `environment.environment().as_dict()`, kept in the file. Training may
            continue in another environment; `moved` then says what differs.
        resume: continue from the file. Otherwise an existing file is not overwritten.

    Attributes:
        moved: the differences between the environment that wrote the file and the present one, for instance
            "torch: 2.11.0, now 2.13.0". Empty without differences, for a new run, and if neither has an environment.

    Raises:
        FileExistsError: the file exists, without `resume`.
        FileNotFoundError: `resume`, and there is no file.
        ValueError: `resume`, and the settings differ, or the file is damaged or of another format; `every` below 1. A
            damaged file is told by the checksums that PyTorch writes, so files of earlier versions are checked, too.
        OSError: `resume`, and the file cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every: int = 100,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        resume: bool = False,
    ):
        if every < 1:
            raise ValueError(f"every={every}: a checkpoint is written every so many steps, at least 1.")
        self.path, self.every, self.settings = Path(path), every, dict(settings or {})
        self.stored: dict[str, Any] | None = None
        self.environment = None if environment is None else dict(environment)
        self.moved: list[str] = []
        check_path(self.path, resume=resume)
        if not resume:
            return
        self.stored = _read(self.path)
        before = self.stored["settings"]
        changes = [
            f"{name}: {before.get(name)!r}, now {self.settings.get(name)!r}"
            for name in sorted({*before, *self.settings})
            if before.get(name) != self.settings.get(name)
        ]
        if changes:
            raise ValueError(
                f"{self.path} was made with other settings ({'; '.join(changes)}), and the losses would not go on as "
                "they were: use the same settings, or train in another folder."
            )
        self.moved = differences(self.stored["environment"] or {}, self.environment or {})

    @property
    def steps(self) -> int:
        """Number of steps in the checkpoint from which the run continues; 0 for a new run, and after `load`."""
        return 0 if self.stored is None else self.stored["steps"]

    @property
    def rows(self) -> list[dict[str, float]]:
        """The history up to the checkpoint from which the run continues; empty for a new run, and after `load`."""
        return [] if self.stored is None else list(self.stored["rows"])

    def load(self, model: torch.nn.Module, optimizer: Any, scaler: Any, batches: Any) -> int:
        """Puts the stored state into these objects and the random generators.

        Args:
            model, optimizer, scaler, batches: made in the same way as the saved ones; each has `load_state_dict`.

        Returns:
            The number of steps done so far; 0 for a new run, which changes nothing.

        Raises:
            TypeError: the batches have no `state_dict`.
            ValueError: what is stored does not fit these objects.
        """
        if not hasattr(batches, "state_dict"):
            raise TypeError("a checkpoint needs batches with state_dict(), such as labutils.gpt2.packing.batches makes")
        if self.stored is None:
            return 0
        stored, self.stored = self.stored, None  # frees the copy of the weights after this method
        try:
            model.load_state_dict(stored["model"])
            optimizer.load_state_dict(stored["optimizer"])
            scaler.load_state_dict(stored["scaler"])
            batches.load_state_dict(stored["batches"])
            version, numbers, gauss = stored["random"]["python"]
            random.setstate((version, tuple(numbers), gauss))
            torch.set_rng_state(stored["random"]["torch"])
            there = stored["random"]["cuda"][: torch.cuda.device_count()]  # this machine may have fewer GPUs
            if there:
                torch.cuda.set_rng_state_all(there)
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{self.path} does not fit this model and these texts ({type(error).__name__}: {error}): "
                "restore it, or start without --resume in another folder."
            ) from error
        return stored["steps"]

    def save(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        scaler: Any,
        batches: Any,
        steps: int,
        rows: list[dict[str, float]],
    ) -> None:
        """Writes the state after `steps` steps. The old file is replaced only when the new one is complete.

        Args:
            model, optimizer, scaler, batches: their `state_dict` is saved.
            steps: number of steps so far.
            rows: the rows of the history so far, as in `training.History`.

        Raises:
            OSError: the file cannot be written, for instance on a full disk; the old file is still there.
        """
        state = {
            "format": FORMAT,
            "settings": self.settings,
            "environment": self.environment,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "batches": batches.state_dict(),
            "random": {
                "python": random.getstate(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
            "steps": steps,
            "rows": rows,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = files.beside(self.path)
        try:
            with new.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # on disk before it replaces the old file
            os.replace(new, self.path)
        except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
            raise OSError(
                f"the checkpoint after step {steps} could not be written to {self.path}, which is unchanged: is the "
                f"disk full? ({error})"
            ) from error
        finally:
            new.unlink(missing_ok=True)
