"""Whether the Hugging Face Hub answers, asked once.

Its libraries ask for each file, and where there is no network they try each of them for a quarter
of a minute.
"""

import functools
import logging
import os
import sys

import httpx
from huggingface_hub import constants

from rlp.config import ConfigError, first_line

PATIENCE_S = 5
"""For the Hub to answer."""


@functools.cache
def settle_hub() -> None:
    """Put the Hub's libraries offline, as `HF_HUB_OFFLINE=1` does, where the Hub does not answer
    one request.

    What is in their cache is still found, and what is not there is said at once. To be called
    before a name is looked up.

    Raises:
        ConfigError: HF_ENDPOINT is no address, or a proxy is named that can not be used; the
            libraries would say so in many words, or not at all.
    """
    if not constants.HF_HUB_OFFLINE and not _answers():
        logging.getLogger("rlp.data.hub").warning(
            "%s does not answer; only what is in the cache is used", constants.ENDPOINT
        )
        constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE


def _answers() -> bool:
    """Whether the Hub answers at all."""
    try:
        address = httpx.URL(constants.ENDPOINT)
    except httpx.InvalidURL as error:
        raise ConfigError(
            f"HF_ENDPOINT is {constants.ENDPOINT!r}, which is no address ({error}). Write one such"
            " as https://huggingface.co, or unset it."
        ) from error
    if address.scheme not in ("http", "https") or not address.host:
        raise ConfigError(
            f"HF_ENDPOINT is {constants.ENDPOINT!r}, which is no address. Write one such as"
            " https://huggingface.co, or unset it."
        )

    try:
        httpx.head(constants.ENDPOINT, timeout=PATIENCE_S)
    except httpx.HTTPError:
        return False
    # Before it asks, it reads what proxies the environment names.
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
        named = [name for name in proxies if name.lower() != "no_proxy"]
        raise ConfigError(
            f"the proxy that {' or '.join(named)} names can not be used: {first_line(error)}. Write"
            " http://HOST:PORT, or unset it."
        ) from error
    return True
