"""Whether the Hugging Face Hub answers, asked once.

Its libraries ask for each file, and where there is no network they try each of them for a quarter of a minute.
"""

import functools
import logging
import sys

import httpx
from huggingface_hub import constants

PATIENCE_S = 5
"""For the Hub to answer."""


@functools.cache
def settle_hub() -> None:
    """Put the Hub's libraries offline, as `HF_HUB_OFFLINE=1` does, where the Hub does not answer one request.

    What is in their cache is still found, and what is not there is said at once. To be called before a name is looked up.
    """
    if not constants.HF_HUB_OFFLINE and not _answers():
        logging.getLogger("rlp.hub").warning("%s does not answer; only what is in the cache is used", constants.ENDPOINT)
        constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE


def _answers() -> bool:
    try:
        httpx.head(constants.ENDPOINT, timeout=PATIENCE_S)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True
