"""Where timm's pretrained weights come from: the hub's local cache, or the hub if it answers."""

import queue
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import timm

from ..cli import UsageError

PATIENCE = 5.0
"""Seconds until the hub counts as out of reach; twice as many for finding its name."""

HUB_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


def source(name: str) -> dict[str, Any]:
    """Return the arguments with which timm takes the weights of a model from where they are.

    What is in the cache is taken without asking the hub. Without a connection the hub's client
    would try again for a minute: whether it answers is seen first.

    Args:
        name: timm name.

    Raises:
        UsageError: they are not in the cache, and the hub does not answer.
    """
    if not _hub_id(name):
        return {}
    cached = cached_file(name)
    if cached is not None:
        # The hub's file has timm's names, whatever the file that it was made from needs.
        return {"pretrained_cfg_overlay": {"file": str(cached), "custom_load": False}}
    reason = _unreachable()
    if reason:
        raise not_loaded(name, reason)
    return {}


def cached_file(name: str) -> Path | None:
    """Return the weights of a timm model in the hub's cache; None if it cannot be told."""
    hub_id = _hub_id(name)
    if not hub_id:
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    found = (
        try_to_load_from_cache(hub_id, file, cache_dir=constants.HF_HUB_CACHE) for file in HUB_FILES
    )
    return next((Path(path) for path in found if isinstance(path, str)), None)


def not_loaded(name: str, reason: str) -> UsageError:
    """Return the error for weights that could not be had: what to fetch, and where to put it."""
    what, where, hub_id = "them", "", _hub_id(name)
    if hub_id:
        from huggingface_hub import constants

        what = f"{HUB_FILES[0]} of {constants.ENDPOINT}/{hub_id}"
        where = f" (they are kept in {constants.HF_HUB_CACHE})"
    return UsageError(
        f"--weights: the pretrained weights of {name} could not be loaded ({reason}); fetch {what} "
        f"and pass it as --weights FILE, or start once with a connection{where}, or choose another "
        "--backbone"
    )


def _hub_id(name: str) -> str:
    """Return the repository of a model; "" for none, or one with files of other names."""
    own = timm.get_pretrained_cfg(name)
    usual = own is not None and not own.hf_hub_filename and own.custom_load != "hf"
    return (own.hf_hub_id or "") if own is not None and usual else ""


def _unreachable() -> str:
    """Say why the hub cannot be reached, "" if it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    asked = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    answer: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        try:
            urllib.request.urlopen(asked, timeout=PATIENCE).close()
            answer.put("")
        except urllib.error.HTTPError as error:
            # Whatever it says, it is there.
            error.close()
            answer.put("")
        except Exception as error:
            # Whatever it is, the hub was not reached; the program may even have ended meanwhile.
            answer.put(str(getattr(error, "reason", error)) or type(error).__name__)

    # Looking a name up cannot be given a time limit.
    threading.Thread(target=ask, daemon=True).start()
    try:
        reason = answer.get(timeout=2 * PATIENCE)
    except queue.Empty:
        reason = "no answer"
    return f"no connection to {constants.ENDPOINT}: {reason}" if reason else ""
