"""Provenance says what made a number, and nothing about whose machine it was."""

import getpass
import json
import os
import socket
from pathlib import Path

import pytest

from vllm_dpp.bench.provenance import command_line, one_line, provenance, without_folders

MODULE = "vllm_dpp.bench.throughput"


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/a/b/model", "model"),
        ("/a/b/model/", "model"),
        ("--output=/a/b.json", "--output=b.json"),
        ("~/models/x", "x"),
        ("../x.json", "x.json"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("dpp@0.25:k3", "dpp@0.25:k3"),
        ("--repeats=3", "--repeats=3"),
    ],
)
def test_folders_are_cut(argument: str, shown: str) -> None:
    assert without_folders(argument) == shown


def test_command_line_is_quoted() -> None:
    assert command_line("m", ["--x", "a b"]) == "python -m m --x 'a b'"


def test_no_host_user_or_path() -> None:
    text = json.dumps(provenance(MODULE, ["--model", "/secret/place/model"]))
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert os.getcwd() not in text
    assert "secret" not in text
    if len(getpass.getuser()) > 4:
        assert getpass.getuser() not in text


def test_what_it_holds() -> None:
    found = provenance(MODULE, [])
    assert set(found) == {"commit", "dirty", "versions", "machine", "command", "utc"}
    assert found["commit"] is None or len(found["commit"]) == 40
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["cpu"]
    assert found["utc"].endswith("+00:00")
    assert found["versions"]["torch"] in one_line(found)
