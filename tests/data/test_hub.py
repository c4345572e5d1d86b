"""Data of the Hub: asked once, and told when it does not answer."""

import os
import time

import httpx
import pytest
from huggingface_hub import constants

from rlp.config import ConfigError, DataConfig, ModelConfig
from rlp.data import hub
from rlp.data.errors import DataError
from rlp.data.sources import open_rows
from rlp.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("unpacked")


@pytest.fixture
def hub_unknown(monkeypatch: pytest.MonkeyPatch):
    """Nobody has asked yet whether the Hub answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.settle_hub.cache_clear()
    yield
    hub.settle_hub.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once(hub_unknown, monkeypatch: pytest.MonkeyPatch):
    """One request of a few seconds in place of a minute of retries for each file; the message says
    what to write."""
    asked = []

    def refuse(address: str, timeout: float) -> None:
        asked.append((address, timeout))
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(httpx, "head", refuse)
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(
            ConfigError,
            match=(
                "model.tokenizer: no tokenizer at 'someone/model'.*Write a folder that holds a"
                " Hugging Face model, or a Hub name that this machine can reach"
            ),
        ):
            load_tokenizer(ModelConfig(path="someone/model"))
    with pytest.raises(
        DataError, match="data.train: 'hub:someone/data' can not be read.*or has in its cache"
    ):
        open_rows(["hub:someone/data"], DataConfig(), "train", "data.train")
    assert asked == [(constants.ENDPOINT, hub.PATIENCE_S)] and time.monotonic() - start < 20


def test_a_hub_that_answers_is_used(hub_unknown, monkeypatch: pytest.MonkeyPatch):
    """With whatever status: that it is there is enough."""
    monkeypatch.setattr(httpx, "head", lambda address, timeout: httpx.Response(503))
    hub.settle_hub()
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    "name, value, words",
    [
        (
            "HTTPS_PROXY",
            "socks9://there",
            (
                r"the proxy that HTTPS_PROXY names can not be used: .* Write http://HOST:PORT, or"
                r" unset it"
            ),
        ),
        ("HTTPS_PROXY", "http://[::bad", r"the proxy that HTTPS_PROXY names can not be used"),
        (
            "HF_ENDPOINT",
            "garbage",
            (
                r"HF_ENDPOINT is 'garbage', which is no address. Write one such as"
                r" https://huggingface.co"
            ),
        ),
        (
            "HF_ENDPOINT",
            "https://there:port",
            r"HF_ENDPOINT is 'https://there:port', which is no address \(",
        ),
    ],
)
def test_a_proxy_or_an_endpoint_that_is_none_is_a_config_error(
    hub_unknown, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
):
    """Said before anything is asked; the libraries raise whatever their parsers do."""
    for other in [other for other in os.environ if other.lower().endswith("_proxy")]:
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    if name == "HF_ENDPOINT":
        monkeypatch.setattr(constants, "ENDPOINT", value)
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(ModelConfig(path="someone/model"))


@pytest.mark.parametrize("source", ["hub:", "hub:@part"])
def test_hub_with_nothing_after_it_asks_nobody(
    hub_unknown, monkeypatch: pytest.MonkeyPatch, source: str
):
    monkeypatch.setattr(httpx, "head", lambda address, timeout: pytest.fail("the Hub was asked"))
    with pytest.raises(DataError, match="is no name of a Hub data set. Write hub:OWNER/NAME"):
        open_rows([source], DataConfig(), "train", "data.train")
