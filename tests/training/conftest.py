"""Finished runs that the tests of training share, one a session."""

import pytest
from support import kills

import jpq


@pytest.fixture(scope="session")
def tiny_trial(tmp_path_factory):
    """Folder of a finished trial (not exported) of the smallest run, `kills.tiny_config`; for reading only."""
    return jpq.optimize(kills.tiny_config(tmp_path_factory.mktemp("tiny")), final=False).folder
