"""Published models and their files: local ones, or those of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def missing_model(field: str, name: str) -> str | None:
    """Why ``name`` is neither a directory here nor a hub id; None if it is one of them."""
    path = Path(name).expanduser()
    on_hub = not path.exists() and name.count("/") <= 1 and name[:1] not in {"", ".", "/", "~"}
    if on_hub or (path / "config.json").is_file() or (path / "preprocessor_config.json").is_file():
        return None
    return (
        f"{name!r} is no directory of a model; give field {field!r} one, or a hub id (owner/name)"
    )


def pretrained(kind: Any, name: str, **options: Any) -> Any:
    """``kind.from_pretrained`` of a directory or a hub id.

    Raises:
        ValueError: it cannot be had, with the remedy.
    """
    path = Path(name).expanduser()
    if kind.__name__.startswith("Auto"):  # else it asks on the terminal whether to run a hub's code
        options["trust_remote_code"] = False
    try:
        return kind.from_pretrained(str(path) if path.exists() else name, **options)
    except OSError as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"{kind.__name__} of {name!r} is neither in a directory here nor to be had from the "
            f"Hugging Face hub ({reason}); where there is a network run 'hf download {name}', or "
            "give a local directory"
        ) from error


def fetched(field: str, name: str, file: str) -> Path:
    """``name`` where it is a file, else ``file`` in the directory or hub repository ``name``.

    Raises:
        ValueError: it cannot be had, with the remedy.
    """
    problem = missing_file(field, name, file)
    if problem is not None:
        raise ValueError(problem)
    path = Path(name).expanduser()
    if path.exists():
        return path if path.is_file() else path / file
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except OSError as error:
        raise ValueError(
            f"{file} of {name!r} cannot be had from the Hugging Face hub ({type(error).__name__}); "
            f"where there is a network run 'hf download {name} {file}', or give field {field!r} a "
            "local copy"
        ) from error


def missing_file(field: str, name: str, file: str) -> str | None:
    """Why ``name`` is no file, no directory with ``file`` and no hub id; None if it is one."""
    path = Path(name).expanduser()
    if path.is_file() or (path / file).is_file():
        return None
    if not path.exists() and name.count("/") == 1 and name[0] not in "./~":
        return None
    return (
        f"{name!r} is no file and no directory with {file}; give field {field!r} one, or a hub id "
        "(owner/name)"
    )


def weights_file(field: str, name: str) -> Path:
    """``name`` where it is a file, else that of the hub with the name ``owner/name/file``.

    Raises:
        ValueError: it cannot be had, with the remedy.
    """
    problem = missing_weights(field, name)
    if problem is not None:
        raise ValueError(problem)
    path = Path(name).expanduser()
    repository, _, file = name.rpartition("/")
    return path if path.is_file() else fetched(field, repository, file)


def missing_weights(field: str, name: str) -> str | None:
    """Why ``name`` is no file here and does not read like ``owner/name/file``; None if it does."""
    path = Path(name).expanduser()
    on_hub = not path.exists() and name.count("/") == 2 and name[0] not in "./~"
    if on_hub or path.is_file():
        return None
    return f"{name!r} is no file here; give field {field!r} one, or owner/name/file on the hub"
