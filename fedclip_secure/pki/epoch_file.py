"""The epoch file: by it a journal that was restored from a backup, lost, or is a second one gives itself away.

It lies with the identity, outside the journal's folder, and holds which journal goes with it, a number
that rises with each step of that journal, and the models over which this silo's vector may have left.
So whoever restores the journal alone still cannot make this silo sign over one of them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedclip_secure.disk import lock_file, refused
from fedclip_secure.errors import DataError
from fedclip_secure.files import write_atomically

JOURNAL_BYTES = 16  # of a journal's random name


@dataclass(frozen=True, slots=True)
class Epoch:
    """`number` of steps, and models as (digest, whether updates travelled and not only counts)."""

    number: int = 0
    journal: bytes = b""  # its name; empty before the first one is made
    models: tuple[tuple[bytes, bool], ...] = ()

    def save(self, path: Path) -> None:
        """Write it; on the disk when this returns.

        Raises:
            DataError: the disk refuses.
        """
        lines = [f"epoch {self.number} {self.journal.hex() or '-'}"]
        lines += [f"{model.hex()} {int(trained)}" for model, trained in self.models]
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode(), 0o600)

    @classmethod
    def load(cls, path: Path) -> Epoch | None:
        """Read it; None where it is missing: `enroll` made one.

        Raises:
            DataError: it is damaged.
        """
        try:
            first, *rest = path.read_text("ascii").splitlines()
            name, number, journal = first.split(" ")
            models = tuple((bytes.fromhex(model), trained == "1") for model, trained in map(str.split, rest))
            named = b"" if journal == "-" else bytes.fromhex(journal)
            if name != "epoch" or len(named) not in (0, JOURNAL_BYTES) or any(len(model) != 32 for model, _ in models):
                raise ValueError(first)
            return cls(int(number), named, models)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(refused(error, path, otherwise="restore the silo's epoch file there")) from error
        except ValueError as error:
            raise DataError(
                f"'{path}': cannot be read as the silo's epoch file; restore it from a backup, or remove it "
                "and run `fedclip-silo recover`"
            ) from error


def lock_epoch(path: Path) -> BinaryIO:
    """Keep other processes from working under this identity while the file that is returned is open.

    Raises:
        DataError: one does, maybe in another workdir; or the disk refuses.
    """
    held = f"'{path.parent}': another fedclip-silo works under this identity; wait for it, or stop it"
    return lock_file(path.with_name(f"{path.name}.lock"), held)
