"""What a run meets outside the mathematics: flags and keywords, device, Ctrl-C, files, commit and machine."""

import argparse
import contextlib
import difflib
import functools
import inspect
import itertools
import os
import platform
import re
import signal
import subprocess
import tempfile
import threading
import typing
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps two runs apart
    fcntl = None


def make_parser(description, groups):
    """An ArgumentParser with a flag for every field of some dataclasses, {title: an instance}. --help shows its values,
    and the comments behind the fields: they are read from the source, so call this when that is imported."""
    parser = argparse.ArgumentParser(
        description=description, usage="%(prog)s [--FLAG VALUE ...]", argument_default=argparse.SUPPRESS,
        allow_abbrev=False, exit_on_error=False,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34),
    )  # fmt: skip
    for title, config in groups.items():
        group = parser.add_argument_group(title)
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(type(config)), re.MULTILINE))
        for name, hint in typing.get_type_hints(type(config)).items():
            kind, *optional = typing.get_args(hint) or (hint,)
            default = _as_text(getattr(config, name))
            text = " ".join([comments.get(name, ""), f"({default})" * (default != "")]).strip().replace("%", "%%")
            if kind is bool:
                how = {"action": argparse.BooleanOptionalAction}
            else:
                how = {"type": _reader(kind, optional), "metavar": kind.__name__.upper()}
            group.add_argument("--" + name.replace("_", "-"), help=text, **how)
    return parser


def parse_arguments(parser, argv, keywords):
    """The flags of argv, a list of strings, and keywords, {field: value}, as if they were flags too -> {field: value}
    of those given. ValueError in one sentence; for an unknown name with the one that it is like."""
    flags = [_as_flag(name, value) for name, value in keywords.items()]
    try:
        given, unknown = parser.parse_known_args([*argv, *flags])
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        known = {flag[2:]: flag for flag in parser._option_string_actions if flag.startswith("--")}
        flag = unknown[0].split("=")[0]
        name = flag.strip("-").replace("_", "-")
        close = [k for k in known if k.startswith(name)] or difflib.get_close_matches(name, known, 1, cutoff=0.7)
        raise ValueError(f"there is no {flag}" + (f": did you mean {known[close[0]]}?" if close else ", see --help"))
    return vars(given)


def as_keywords(text):
    """The sentence with its flags as a notebook writes them: n_layer for --n-layer."""
    return re.sub(r"(?<![\w'])--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), text)


def _reader(kind, optional):
    """A function that makes a `kind` of a string; where that is optional, None of "none"."""

    def read(text):
        return None if optional and text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # so that argparse says: invalid int value
    return read


def _as_text(value):
    return "none" if value is None else str(value)


def _as_flag(name, value):
    name = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={_as_text(value)}"


@dataclass(frozen=True)
class Place:
    """Where to train: a run may go on in another place."""

    out: str | None = None  # run folder; none: runs/PRESET, or the next free one of runs/PRESET-2, ...
    device: str = "auto"  # cpu, cuda, mps, ...; auto: the best that is there
    resume: bool = False  # go on with the run in --out, or with the latest of --preset


def pick_device(name):
    """The torch.device of that name, "auto" being the best that is there. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        zero = torch.zeros(1, device=name)
        zero.item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return zero.device  # cuda:0, where only cuda was asked for


class InUse(ValueError):
    """Another run is at work in the folder."""


@contextlib.contextmanager
def claim(folder):
    """Make the run folder, and keep other runs out of it until the block ends or this process dies. What was made is
    removed if it is still empty then. InUse; ValueError for a folder that cannot be made or written to."""
    with contextlib.ExitStack() as cleanup:
        try:
            for path in (folder, *folder.parents)[::-1]:
                if not path.exists():
                    path.mkdir(exist_ok=True)
                    cleanup.callback(_remove_if_empty, path)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"--out {str(folder)!r} cannot be used: {error.strerror}") from error
        if fcntl:
            cleanup.callback(os.close, lock := os.open(folder, os.O_RDONLY))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InUse(f"another run is at work in {str(folder)!r}: choose another --out") from None
            except OSError:  # a network drive without locks
                pass
        yield


def _remove_if_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()


def choose_folder(claims, out, preset, resume):
    """out; or, of runs/PRESET, runs/PRESET-2, ..., the first that is free, or to resume the last that is not. It is
    claimed until the ExitStack `claims` closes. ValueError as in `claim`, for an `out` that is no name of a folder,
    and, unless it is to be resumed, for one that holds a run."""
    numbered = (Path("runs", preset if i == 1 else f"{preset}-{i}") for i in itertools.count(1))
    if out is None and resume:
        used = [path for path in itertools.takewhile(Path.exists, numbered) if (path / "checkpoint.pt").exists()]
        out = used[-1] if used else Path("runs", preset)
    while out is None:
        folder = next(numbered)
        with contextlib.suppress(InUse), contextlib.ExitStack() as claimed:
            claimed.enter_context(claim(folder))
            if not (folder / "checkpoint.pt").exists():
                claims.enter_context(claimed.pop_all())
                return folder
    if not str(out) or (os.path.lexists(out) and not Path(out).is_dir()):
        raise ValueError(f"--out {str(out)!r} has to be a folder")
    claims.enter_context(claim(Path(out)))
    if (Path(out) / "checkpoint.pt").exists() and not resume:
        raise ValueError(f"{str(out)!r} already holds a run: add --resume to go on with it, or choose another --out")
    return Path(out)


class Interrupted(SystemExit):
    """Raised after Ctrl-C, once all is saved."""


@contextlib.contextmanager
def interrupt_between_steps():
    """Yields a list, empty until Ctrl-C, so that no step is torn in half. A second Ctrl-C stops at once. What a cluster
    sends before it kills (SIGTERM), and a closed terminal (SIGHUP), count as Ctrl-C, unless nohup ignores them."""
    interrupts = []

    def note(signum, frame):
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(signum)

    if threading.current_thread() is not threading.main_thread():  # where there are no signals
        yield interrupts
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    before = {signum: handler for signum, handler in before.items() if handler != signal.SIG_IGN}
    try:
        for signum in before:
            signal.signal(signum, note)
        yield interrupts
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def write_atomically(path, write):
    """Call write(a temporary path), then rename: a crash half way leaves the old file whole. OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"cannot write {str(path)!r}, is the disk full? {error}") from error
    finally:  # half a checkpoint would keep the disk full
        temporary.unlink(missing_ok=True)


def commit():
    """The commit of this code, with "-dirty" if a .py file differs from it, or None. Where the code was copied without
    its git history, COMMIT in the environment names it."""
    git = functools.partial(subprocess.run, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    with contextlib.suppress(OSError):  # no git
        changed = git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode == 1
        if name := git(["git", "describe", "--always"]).stdout.strip():
            return name + "-dirty" * changed
    return os.environ.get("COMMIT")


def machine(device):
    """What the numbers of a run depend on besides its settings: a dict for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"commit": commit(), "torch": torch.__version__, "python": platform.python_version()}
    system = {"system": f"{platform.system()} {platform.machine()}", "device": f"{device} ({name})"}
    return versions | system | {"cpus": os.cpu_count()}
