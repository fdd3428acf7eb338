"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from pqqp_lightning.errors import Problem
from pqqp_lightning.export.card import HUB_ID
from pqqp_lightning.export.target import Target

OPTION = "push_to_hub"
TOKEN_WAY_OUT = "Run hf auth login, or set HF_TOKEN to a token that may write."


class NotUploaded(Exception):
    """The export is complete on this machine, but the hub did not take it."""


def check_hub(hub_id: str | None, out: Path, target: Target | None) -> list[Problem]:
    """What stands against an upload, before any work.

    Args:
        hub_id: OWNER/NAME, or None for no upload.
        out: what is written on this machine.
        target: what writes it, if it is known.
    """
    if hub_id is None:
        return []
    from huggingface_hub import constants, get_token

    problems = []
    if wrong := _what_is_no_id(hub_id):
        way_out = "Write OWNER/NAME, such as me/my-model: letters, digits, -, _ and . in NAME."
        problems.append(Problem(OPTION, hub_id, f"is not an id of the hub: {wrong}", way_out))
    if constants.HF_HUB_OFFLINE:
        way_out = "Unset HF_HUB_OFFLINE, or leave it out and upload the folder later: hf upload OWNER/NAME FOLDER."
        problems.append(Problem(OPTION, hub_id, "needs the hub, and HF_HUB_OFFLINE is set", way_out))
    elif not get_token():
        problems.append(Problem(OPTION, hub_id, "needs a token of the hub, and there is none", TOKEN_WAY_OUT))
    if target is not None and target.is_file(out):
        way_out = "Name a folder in --out."
        problems.append(Problem(OPTION, hub_id, f"uploads a folder with its model card, and {out} is a file", way_out))
    return problems


def _what_is_no_id(hub_id: str) -> str:
    """What keeps ``hub_id`` from being OWNER/NAME; empty if nothing does."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(hub_id, str):
        return "it is not text"
    if "://" in hub_id:
        return "it is an address"
    if (slashes := hub_id.count("/")) != 1:
        return f"it has {slashes or 'no'} slash{'es' if slashes else ''}, and needs one"
    if "" in hub_id.split("/"):
        return "it has nothing before or after the slash"
    if odd := sorted(set(re.findall(r"[^\w./-]", hub_id, re.ASCII))):
        return f"it contains {', '.join(map(repr, odd))}"
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        return "the hub allows no --, no .., no - or . at either end, no .git at the end and at most 96 letters"
    return "" if HUB_ID.fullmatch(hub_id) else "OWNER begins with a letter, a digit, - or _"


def upload(folder: Path, hub_id: str) -> str:
    """Upload everything in ``folder``; the repository is created if there is none.

    Returns:
        The address.

    Raises:
        NotUploaded: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(hub_id, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Export from pqqp-lightning")
    except Exception as error:  # its libraries for requests have errors of their own, which changed between versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        words = f"{folder} is complete, but cannot be uploaded to {hub_id}: {reason}."
        raise NotUploaded(f"{words} {TOKEN_WAY_OUT} Then: hf upload {hub_id} '{folder}'.") from error
    return str(address)
