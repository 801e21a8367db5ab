"""Upload the adapter or model of a finished run to the Hugging Face Hub."""

from __future__ import annotations

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from .folder import RunFolder


def create_repository(name: str) -> None:
    """Create a model repository unless it exists. Called before the training, so that a missing login is found early.

    Raises:
        OSError: there is no login, or it may not write to the repository.
    """
    try:
        HfApi().create_repo(name, exist_ok=True)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise OSError(
            f"push_to_hub: {name} cannot be created ({_reason(error)}); log in with: hf auth login"
        ) from error


def push(folder: RunFolder, name: str) -> str:
    """Upload the folder of the adapter, or of the model.

    Returns:
        The repository's address.

    Raises:
        OSError: the upload failed; the run is finished, and the same command uploads it again.
    """
    try:
        return str(
            HfApi().upload_folder(
                repo_id=name, folder_path=folder.weights, commit_message="Upload the weights of a run"
            )
        )
    except (HfHubHTTPError, OSError) as error:
        raise OSError(
            f"push_to_hub: the upload to {name} failed ({_reason(error)}). The run in {folder} is finished; the same "
            "command uploads it again"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
